"""A vocabulary small enough to be read: token ids, their bytes, and which of them end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...messages.errors import InvalidRequestError
from ...messages.request import ChatPrompt

EOS_TOKEN = 0

_PIECES = (b"", b"a", b"b", b"ab", b" c", b"\xc3", b"\xa9", "\N{GREEK SMALL LETTER PI}".encode(), b"d", b"ba")


class Vocabulary:
    """Stands in for a tokenizer library, at both ends: `TextCodec` of the tokenizer, `TokenDecoder` of the detokenizer.

    Some tokens are halves of a character, some spell parts of each other, so that text has to wait now and then.

    Attributes:
        size: token ids are below it.
    """

    is_bytewise = True
    leading_space: Literal["keep", "drop_one", "drop_all"] = "keep"
    special_token_ids: frozenset[int] = frozenset({EOS_TOKEN})
    added_token_ids: frozenset[int] = frozenset()
    eos_token_ids: tuple[int, ...] = (EOS_TOKEN,)

    def __init__(self, size: int) -> None:
        self.size = size

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < len(_PIECES):
            return _PIECES[token_id]
        return b"%c" % (97 + token_id % 26)

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    @property
    def max_token_chars(self) -> int | None:
        return None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise InvalidRequestError("prompts of the simulation are token ids")

    def render_chat(self, prompt: ChatPrompt) -> str:
        raise InvalidRequestError("prompts of the simulation are token ids")
