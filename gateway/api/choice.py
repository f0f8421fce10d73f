"""What is known of a request's prompts and of the sequences that the engine generates for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...messages.request import ChatPrompt, FinishReason, TokenLogprobs
from .logprobs import TextOffsets


class PromptState:
    """A prompt, and what became known of it.

    Attributes:
        num_unfinished: of its sequences.
        num_longest: tokens of the longest of those that have finished.
    """

    __slots__ = (
        "echo_text",
        "is_admitted",
        "num_cached_tokens",
        "num_longest",
        "num_unfinished",
        "prompt",
        "prompt_logprobs",
        "token_ids",
    )

    def __init__(self, prompt: str | Sequence[int] | ChatPrompt, echo_text: str = "") -> None:
        self.prompt = prompt
        self.echo_text = echo_text
        self.is_admitted = False
        self.token_ids: tuple[int, ...] = ()
        self.num_cached_tokens = 0
        self.num_unfinished = 0
        self.num_longest = 0
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


class Choice:
    """One sequence: its place in the answer, and what it gained so far.

    Attributes:
        head, tail: bytes before and behind a chunk's text, made once.
        stream: where its texts go by themselves, once they need nothing but these; else None.
        has_begun: whether a chunk of it was written.
        last_token_ns: when its last token came; 0 before the first.
    """

    __slots__ = (
        "finish_reason",
        "first_token_ns",
        "has_begun",
        "head",
        "index",
        "last_token_ns",
        "logprobs",
        "num_tokens",
        "offsets",
        "prompt",
        "stop_reason",
        "stream",
        "tail",
        "text_offsets",
        "texts",
        "token_ids",
    )

    def __init__(self, index: int, prompt: PromptState) -> None:
        self.index = index
        self.prompt = prompt
        self.head = b""
        self.tail = b""
        self.stream: TextSink | None = None
        self.has_begun = False
        self.num_tokens = 0
        self.first_token_ns = 0
        self.last_token_ns = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.text_offsets: TextOffsets | None = None
        self.offsets: list[int] = []


class TextSink(Protocol):
    """Where texts go that need nothing but a head and a tail; `EventStream` is one."""

    def write_text(self, head: bytes, text: str, tail: bytes) -> int:
        """Returns when this counts as written, monotonic ns."""
