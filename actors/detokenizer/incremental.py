"""Text of a stream of token ids, piece by piece: never part of a character, and together the text of the whole."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from itertools import islice
from typing import Literal, NamedTuple, Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CONTEXT = 8  # prompt tokens that a windowed decoder starts from
_MAX_UNDECODED = 32  # tokens after which a windowed decoder stops waiting for a character's end


class TokenDecoder(Protocol):
    """The detokenizer's port to a tokenizer library; implemented by `HFTokenizer`.

    Attributes:
        is_bytewise: a text is the concatenation of its tokens' bytes, but for `leading_space`.
        leading_space: what happens to the space at the beginning of a text: kept, one dropped, or all of the first
            token's.
        special_token_ids: tokens that `skip_special_tokens` leaves out.
        added_token_ids: tokens outside the trained vocabulary.
        eos_token_ids: the model's end tokens.
    """

    @property
    def is_bytewise(self) -> bool: ...

    leading_space: Literal["keep", "drop_one", "drop_all"]
    special_token_ids: frozenset[int]
    added_token_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...


class TokenPiece(NamedTuple):
    """What one token adds to a text.

    Attributes:
        text: its text, None where its bytes are not whole characters.
        data: its bytes.
    """

    text: str | None
    data: bytes


class PieceTable(dict[int, TokenPiece]):
    """Token id -> its piece, filled as tokens appear. Only for bytewise tokenizers.

    Attributes:
        texts: the texts of those pieces that have one.
    """

    def __init__(self, codec: TokenDecoder, skip_special_tokens: bool) -> None:
        super().__init__()
        self.texts: dict[int, str] = {}
        self._codec = codec
        self._skipped = codec.special_token_ids if skip_special_tokens else frozenset[int]()

    def __missing__(self, token_id: int) -> TokenPiece:
        data = b"" if token_id in self._skipped else self._codec.token_bytes(token_id)
        text: str | None
        try:
            text = self.texts[token_id] = data.decode()
        except UnicodeDecodeError:
            text = None
        piece = self[token_id] = TokenPiece(text, data)
        return piece

    def is_skipped(self, token_id: int) -> bool:
        return token_id in self._skipped


class ByteDecoder:
    """For tokenizers whose text is a concatenation of bytes: a table and the bytes of an unfinished character.

    `feed` gives text as soon as it is sure, `flush` the rest, as decoding the whole would. While `is_pending` is False
    the next token's text is its own, if it has one.

    Bytes that are no UTF-8 become U+FFFD as soon as that is sure, one for each maximal part of a character
    (Unicode 15, section 3.9, "U+FFFD substitution of maximal subparts"), which is what byte-level decoding of the whole
    gives. Sentencepiece's own decoding of *invalid* runs of byte tokens looks ahead without bound; there this rule
    stands in its place, so that the text of a stream never depends on what comes later.
    """

    __slots__ = ("_leading_space", "_pending", "_pieces", "is_pending")

    def __init__(self, pieces: PieceTable, leading_space: Literal["keep", "drop_one", "drop_all"]) -> None:
        """Args:
        pieces: table of the tokens' bytes.
        leading_space: what to do with the first space; `keep` when the prompt has text.
        """
        self._pieces = pieces
        self._leading_space = leading_space
        self._pending = b""
        self.is_pending = leading_space != "keep"

    def feed(self, token_id: int) -> str:
        text, data = self._pieces[token_id]
        if not self.is_pending and text is not None:
            return text
        if self._leading_space != "keep":
            data = self._drop_leading_space(token_id, data)
        data = self._pending + data
        text, consumed = utf_8_decode(data, "replace", False)
        self._pending = data[consumed:]
        self.is_pending = consumed < len(data) or self._leading_space != "keep"
        return text

    def _drop_leading_space(self, token_id: int, data: bytes) -> bytes:
        if self._leading_space == "drop_all":
            if not self._pieces.is_skipped(token_id):
                self._leading_space = "keep"
            return data.replace(b" ", b"")
        if data:
            self._leading_space = "keep"
        return data.removeprefix(b" ")

    def flush(self) -> str:
        text = self._pending.decode(errors="replace")
        self._pending = b""
        self.is_pending = self._leading_space != "keep"
        return text


class WindowDecoder:
    """For any other tokenizer: decodes a short window twice, without and with the new tokens, and takes the difference.

    The window begins with tokens whose text was sent already, so that what a decoder puts between tokens is right.
    """

    __slots__ = ("_added", "_after_added", "_codec", "_num_sent", "_sent", "_skip", "_window", "is_pending")

    def __init__(
        self,
        codec: TokenDecoder,
        context: Sequence[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        """Args:
        codec: the tokenizer.
        context: the end of the prompt; what its text ends with in mid-character is left out.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: False writes an added token right behind another.
        """
        self._codec = codec
        self._skip = codec.special_token_ids if skip_special_tokens else frozenset[int]()
        self._added = (
            frozenset[int]() if skip_special_tokens or spaces_between_special_tokens else codec.added_token_ids
        )
        self._after_added = False
        self._window = [token_id for token_id in context if token_id not in self._skip][-_MAX_CONTEXT:]
        while self._window and self._decode().endswith(_REPLACEMENT):
            self._window.pop()
        self._num_sent = len(self._window)
        self._sent = self._decode()
        self.is_pending = False  # the core never looks here for a token's own text

    def _decode(self) -> str:
        return self._codec.decode(self._window, False) if self._window else ""

    def feed(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._window.append(token_id)
        added = token_id in self._added
        if added and self._after_added and len(self._window) == self._num_sent + 1:
            self._advance()
            return self._codec.token_text(token_id)
        self._after_added = added
        text = self._decode()
        unsure = text.endswith(_REPLACEMENT) or len(text) <= len(self._sent)
        if unsure and len(self._window) < self._num_sent + _MAX_UNDECODED:
            return ""
        return self._send(text)

    def flush(self) -> str:
        return self._send(self._decode()) if len(self._window) > self._num_sent else ""

    def _send(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._advance()
        return new

    def _advance(self) -> None:
        self._window = self._window[self._num_sent :][-_MAX_UNDECODED:]
        self._num_sent = len(self._window)
        self._sent = self._decode()


def prompt_has_text(pieces: PieceTable, prompt_token_ids: Sequence[int], leading_space: str) -> bool:
    """Whether the answer comes after some text, so that a space at its beginning stays.

    Looks from the end, where the answer is found at once but for prompts of skipped tokens alone.
    """
    if leading_space == "drop_all":  # counts tokens, not characters
        return any(not pieces.is_skipped(token_id) for token_id in reversed(prompt_token_ids))
    return any(pieces[token_id].data for token_id in reversed(prompt_token_ids))


def open_decoder(
    codec: TokenDecoder,
    pieces: PieceTable,
    prompt_token_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
    spaces_between_special_tokens: bool,
) -> ByteDecoder | WindowDecoder:
    """The cheapest decoder that is exact for this tokenizer."""
    if codec.is_bytewise:
        keep = codec.leading_space == "keep" or prompt_has_text(pieces, prompt_token_ids, codec.leading_space)
        return ByteDecoder(pieces, "keep" if keep else codec.leading_space)
    tail = list(islice(reversed(prompt_token_ids), 4 * _MAX_CONTEXT))[::-1]
    return WindowDecoder(
        codec,
        tail,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )
