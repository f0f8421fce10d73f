"""The tokenizer core's port to a tokenizer library; none is named here, so that the core imports without one."""

from __future__ import annotations

from typing import Protocol

from ...messages.request import ChatPrompt


class TextCodec(Protocol):
    """Text to token ids. Implemented by `HFTokenizer`, and by small fakes in tests and simulation."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, the tokenizer's own first."""

    @property
    def max_token_chars(self) -> int | None:
        """Most characters of a text that one token stands for; None where no such bound is known."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text.

        Raises:
            InvalidRequestError: the text cannot be encoded (a lone surrogate).
        """

    def render_chat(self, prompt: ChatPrompt) -> str:
        """The conversation as text, by the chat template; special tokens are part of that text.

        Raises:
            InvalidRequestError: there is no template, or it refuses these messages.
        """
