"""Long lists of token ids, decoded a piece at a time, so that streams go on meanwhile.

Four megabytes of ids take the decoder 40 ms. A thread is no help: the decoder keeps the interpreter's lock until it is
done, so that the loop waited as long as before (`octavo.gateway.bench_json`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from .protocol import TokenId

PIECE_BYTES: Final = 128 * 1024
"""Decoded between two turns of the loop, in about 1 ms."""

_SPACE: Final = b" \t\r\n"
_DECODER: Final = msgspec.json.Decoder(list[TokenId])

IdList = list[int | list[int]]


def is_long_id_list(raw: bytes) -> bool:
    """Whether a JSON value is nothing but a list of numbers from 0 up, or of such lists, that is worth its turns."""
    return len(raw) > PIECE_BYTES and raw[:1] == b"[" and not raw.translate(None, b"0123456789,[]" + _SPACE)


def decode_in_pieces(raw: bytes, into: IdList) -> Iterator[None]:
    """Decode what `is_long_id_list`, and is known to be valid JSON; yields where others may have a turn.

    Args:
        into: is filled with what was decoded.

    Raises:
        msgspec.ValidationError: it is another kind of list, or a number is no token id.
    """
    content = raw.strip(_SPACE)[1:-1]
    if b"[" not in content:
        ids: list[int] = []
        yield from _decode_numbers(content, ids)
        into.extend(ids)
        return
    position = decoded = 0
    while (end := content.find(b"]", position)) >= 0:
        start = content.find(b"[", position, end)
        between = content[position : start if start >= 0 else end].strip(_SPACE)
        if start < 0 or between != (b"," if position else b""):
            raise msgspec.ValidationError("Expected a list of token ids, or a list of such lists")
        ids = []
        yield from _decode_numbers(content[start + 1 : end], ids)
        into.append(ids)
        position = end + 1
        if position - decoded > PIECE_BYTES:
            decoded = position
            yield
    if content[position:].strip(_SPACE):
        raise msgspec.ValidationError("Expected a list of token ids, or a list of such lists")


def _decode_numbers(content: bytes, into: list[int]) -> Iterator[None]:
    position = 0
    while position < len(content):
        end = content.find(b",", position + PIECE_BYTES)
        end = len(content) if end < 0 else end
        into += _DECODER.decode(b"[%b]" % content[position:end])
        position = end + 1
        if position < len(content):
            yield
