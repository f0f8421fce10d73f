import pytest
from tokenizers import decoders, pre_tokenizers

from octavo.actors.tokenizer.token_bytes import (
    DecoderKind,
    byte_alphabet,
    byte_level_bytes,
    classify_decoder,
    metaspace_bytes,
)


def test_the_byte_alphabet_spells_each_byte_once_and_is_that_of_the_library() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    # The library decodes one character at a time to the same byte, where the byte alone is a character.
    for char, byte in alphabet.items():
        if byte < 128:
            assert decoders.ByteLevel().decode([char]) == chr(byte)


def test_a_token_outside_the_byte_alphabet_is_literal_text() -> None:
    assert byte_level_bytes("Ġhi") == b" hi"
    assert byte_level_bytes("é") == b"\xe9"
    assert byte_level_bytes("<think> é") == "<think> é".encode()


def test_sentencepiece_tokens_are_bytes_or_text_with_metaspaces() -> None:
    assert metaspace_bytes("<0xE4>") == b"\xe4"
    assert metaspace_bytes("▁▁é") == "  é".encode()
    assert metaspace_bytes("<0xE4>x") == b"<0xE4>x"


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@pytest.mark.parametrize(
    ("decoder", "kind"),
    [
        (decoders.ByteLevel(), DecoderKind("byte_level")),
        (decoders.Sequence([decoders.ByteLevel()]), DecoderKind("byte_level")),
        (decoders.Sequence(LLAMA), DecoderKind("metaspace", True, "keep")),
        (decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]), DecoderKind("metaspace", True, "drop_one")),
        (decoders.Sequence([*LLAMA, decoders.Strip(" ", 2, 0)]), DecoderKind("other")),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), *LLAMA]), DecoderKind("other")),
        (decoders.Metaspace(), DecoderKind("metaspace", False, "drop_all")),
        (decoders.Metaspace(prepend_scheme="never"), DecoderKind("metaspace", False, "keep")),
        (decoders.Metaspace(replacement="_"), DecoderKind("other")),
        (decoders.WordPiece(), DecoderKind("other")),
        (decoders.BPEDecoder(), DecoderKind("other")),
        (decoders.Fuse(), DecoderKind("other")),
    ],
)
def test_decoders_are_recognised_by_what_they_do(decoder: decoders.Decoder, kind: DecoderKind) -> None:
    assert classify_decoder(decoder.__getstate__()) == kind
