"""From a vocabulary's spelling of a token to the bytes it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

LeadingSpace = Literal["keep", "drop_one", "drop_all"]
"""What decoding does with the space a text would begin with: nothing; drops one; drops all of the first token's."""

METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte, for the 256 printable characters by which byte-level BPE spells bytes.

    Source: `bytes_to_unicode` of GPT-2 (Radford et al. 2019, encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


# Byte -> byte spelt in latin-1: translating and encoding a whole token costs less than a loop over its characters.
_TO_LATIN1 = {ord(char): chr(byte) for char, byte in byte_alphabet().items()}


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level BPE token; one that is not spelt in the byte alphabet (an added token) is literal text."""
    if all(ord(char) in _TO_LATIN1 for char in token):
        return token.translate(_TO_LATIN1).encode("latin-1")
    return token.encode()


def metaspace_bytes(token: str) -> bytes:
    """Bytes of a sentencepiece token inside a text: `<0xE4>` is a byte, a metaspace a space."""
    if match := _BYTE_PIECE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(METASPACE, " ").encode()


class DecoderKind(msgspec.Struct, frozen=True):
    """How a tokenizer's tokens become text.

    Attributes:
        spelling: `byte_level` and `metaspace` texts are the concatenation of their tokens' bytes; `other` is not.
        byte_fallback: whether `<0xE4>` pieces are bytes.
        leading_space: what happens at the beginning of a text.
    """

    spelling: Literal["byte_level", "metaspace", "other"]
    byte_fallback: bool = False
    leading_space: LeadingSpace = "keep"

    def token_bytes(self, token: str) -> bytes:
        """Bytes of a token inside a text, from its spelling; only for a `spelling` other than `other`."""
        if self.spelling == "byte_level":
            return byte_level_bytes(token)
        return metaspace_bytes(token) if self.byte_fallback else token.replace(METASPACE, " ").encode()


OTHER = DecoderKind("other")


def _flatten(decoder: dict[str, object]) -> Iterator[dict[str, object]]:
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders")
        assert isinstance(parts, list)
        for part in parts:
            yield from _flatten(part)
    else:
        yield decoder


def classify_decoder(decoder_json: bytes) -> DecoderKind:
    """Recognise the decoders whose work is a concatenation of bytes, from the `decoder` of a tokenizer.json.

    Anything not recognised is `other`, and is decoded by the library itself.
    """
    decoder = msgspec.json.decode(decoder_json)
    if not isinstance(decoder, dict):
        return OTHER
    parts = [part for part in _flatten(decoder) if part.get("type") != "Fuse"]
    types = [part.get("type") for part in parts]
    if types == ["ByteLevel"]:
        return DecoderKind("byte_level")
    if types == ["Metaspace"] and parts[0].get("replacement") == METASPACE:
        keeps = parts[0].get("prepend_scheme") == "never"
        return DecoderKind("metaspace", leading_space="keep" if keeps else "drop_all")
    return _classify_replace_sequence(parts)


def _classify_replace_sequence(parts: list[dict[str, object]]) -> DecoderKind:
    """Llama's and Gemma's: replace the metaspace, byte fallback, perhaps strip one space at the beginning."""
    spaced, byte_fallback, leading_space = False, False, "keep"
    for part in parts:
        match part:
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                spaced = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if spaced and part is parts[-1]:
                leading_space = "drop_one"
            case _:
                return OTHER
    if not spaced:
        return OTHER
    return DecoderKind("metaspace", byte_fallback, "drop_one" if leading_space == "drop_one" else "keep")
