import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEXTS, byte_level, metaspace, wordpiece
from tokenizers import decoders

from octavo.actors.detokenizer.incremental import PieceTable, open_decoder
from octavo.actors.tokenizer.hf_tokenizer import HFTokenizer

BYTE_LEVEL = byte_level()
METASPACE = metaspace()


def stream(
    codec: HFTokenizer, prompt: list[int], output: list[int], *, skip: bool = True, spaces: bool = True
) -> tuple[list[str], str]:
    """The text after each token, and the flushed rest."""
    decoder = open_decoder(
        codec,
        PieceTable(codec, skip),
        prompt,
        skip_special_tokens=skip,
        spaces_between_special_tokens=spaces,
    )
    pieces = [decoder.feed(token_id) for token_id in output]
    return pieces, decoder.flush()


def joined(*args: object, **kwargs: object) -> str:
    pieces, rest = stream(*args, **kwargs)  # type: ignore[arg-type]
    return "".join(pieces) + rest


token_lists = st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=60)


@settings(max_examples=300)
@given(token_lists, token_lists, st.booleans())
def test_any_byte_level_tokens_stream_to_the_text_of_the_whole(prompt: list[int], ids: list[int], skip: bool) -> None:
    assert joined(BYTE_LEVEL, prompt, ids, skip=skip) == BYTE_LEVEL.decode(ids, skip)


@given(st.text(max_size=60) | st.sampled_from(TEXTS))
def test_no_piece_of_valid_text_has_a_replacement_character(text: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    ids = BYTE_LEVEL.encode(text, False)
    pieces, rest = stream(BYTE_LEVEL, [], ids, skip=False)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + rest == text


def test_text_equals_what_transformers_decodes() -> None:
    reference = BYTE_LEVEL._tokenizer
    rng = random.Random(0)
    for text in TEXTS:
        ids = BYTE_LEVEL.encode(text, True)
        assert joined(BYTE_LEVEL, [], ids) == reference.decode(ids, skip_special_tokens=True) == text
    for _ in range(200):
        ids = [rng.randrange(BYTE_LEVEL.vocab_size) for _ in range(rng.randrange(30))]
        assert joined(BYTE_LEVEL, [], ids) == reference.decode(ids, skip_special_tokens=True)


def test_a_character_comes_whole_with_its_last_byte_and_an_unfinished_one_with_the_flush() -> None:
    ids = [BYTE_LEVEL._fast.token_to_id(char) for char in BYTE_LEVEL._fast.pre_tokenizer.pre_tokenize_str("𝄞")[0][0]]
    assert len(ids) == 4
    assert stream(BYTE_LEVEL, [], ids) == (["", "", "", "𝄞"], "")
    assert stream(BYTE_LEVEL, [], ids[:3]) == (["", "", ""], "\N{REPLACEMENT CHARACTER}")


@given(st.text(alphabet="the dog hello 你é🎉", max_size=30), st.text(alphabet="the dog hello 你é🎉", max_size=30))
@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece_output_is_what_the_whole_has_after_the_prompt(strip: bool, prompt: str, output: str) -> None:
    codec = metaspace(strip)
    prompt_ids, output_ids = codec.encode(prompt, True), codec.encode(output, False)
    whole = codec.decode([*prompt_ids, *output_ids], True)
    assert joined(codec, prompt_ids, output_ids) == whole[len(codec.decode(prompt_ids, True)) :]


def test_a_space_at_the_beginning_stays_after_text_and_goes_at_the_start_of_a_text() -> None:
    ids = METASPACE.encode("hello dog", False)
    assert joined(METASPACE, METASPACE.encode("the", True), ids) == " hello dog"
    assert joined(METASPACE, [METASPACE.bos_token_id], ids) == "hello dog"
    assert joined(METASPACE, [METASPACE.bos_token_id], ids, skip=False) == " hello dog"


@settings(max_examples=200)
@given(st.lists(st.integers(0, METASPACE.vocab_size - 1), max_size=40))
def test_random_sentencepiece_tokens_never_lose_or_repair_text(ids: list[int]) -> None:
    prompt = METASPACE.encode("the", True)
    pieces, rest = stream(METASPACE, prompt, ids)
    raw = b"".join(METASPACE.token_bytes(i) for i in ids if i not in METASPACE.special_token_ids)
    assert "".join(pieces) + rest == raw.decode(errors="replace")


@settings(max_examples=200)
@given(st.lists(st.integers(5, wordpiece().vocab_size - 1), max_size=40), st.sampled_from(["", *TEXTS[:2]]))
def test_other_tokenizers_stream_to_what_the_whole_has_after_the_prompt(ids: list[int], prompt: str) -> None:
    codec = wordpiece()
    assert not codec.is_bytewise
    prompt_ids = codec.encode(prompt, True)
    whole = codec.decode([*prompt_ids, *ids], True)
    assert joined(codec, prompt_ids, ids) == whole[len(codec.decode(prompt_ids, True)) :]


def test_spaces_between_added_tokens_can_be_left_out() -> None:
    codec = wordpiece()
    start, end = codec._fast.token_to_id("<|im_start|>"), codec._fast.token_to_id("<|im_end|>")
    ids = [*codec.encode("fox", False), start, end, start, *codec.encode("dog", False)]
    assert "<|im_start|> <|im_end|> <|im_start|>" in joined(codec, [], ids, skip=False)
    assert "<|im_start|><|im_end|><|im_start|>" in joined(codec, [], ids, skip=False, spaces=False)


class Windowed:
    """The byte-level tokenizer as one whose tokens' bytes are not known."""

    is_bytewise = False

    def __getattr__(self, name: str) -> object:
        return getattr(BYTE_LEVEL, name)


@pytest.mark.parametrize("codec", [BYTE_LEVEL, Windowed()], ids=["bytes", "window"])
def test_the_end_of_a_prompts_character_is_a_character_of_its_own(codec: HFTokenizer) -> None:
    *begin, end = [
        BYTE_LEVEL._fast.token_to_id(char) for char in BYTE_LEVEL._fast.pre_tokenizer.pre_tokenize_str("𝄞")[0][0]
    ]
    hello = BYTE_LEVEL.encode(" hello", False)
    assert joined(codec, [*hello, *begin], [end, *hello]) == "\N{REPLACEMENT CHARACTER} hello"


def test_a_window_does_not_wait_for_ever_for_the_end_of_a_character() -> None:
    stray = BYTE_LEVEL._fast.token_to_id(BYTE_LEVEL._fast.pre_tokenizer.pre_tokenize_str("𝄞")[0][0][-1])
    pieces, rest = stream(Windowed(), [], [stray] * 100)  # type: ignore[arg-type]
    assert "".join(pieces) + rest == "\N{REPLACEMENT CHARACTER}" * 100
    assert len(rest) < 50


def test_all_spaces_of_a_first_token_go_where_the_decoder_drops_them() -> None:
    class Spelled:
        is_bytewise, leading_space = True, "drop_all"
        special_token_ids = added_token_ids = frozenset[int]()
        tokens = ("▁▁the▁dog", "▁▁fox")

        def token_bytes(self, token_id: int) -> bytes:
            return self.tokens[token_id].replace("▁", " ").encode()

    for ids in ([0, 1], [1, 0], [1, 1]):
        whole = decoders.Metaspace(prepend_scheme="always").decode([Spelled.tokens[i] for i in ids])
        assert joined(Spelled(), [], ids) == whole
        assert not whole.startswith(" ")


def test_a_prompt_that_ends_in_mid_character_adds_nothing_of_its_own() -> None:
    broken = BYTE_LEVEL.encode("🎊", False)[:-1] or [BYTE_LEVEL._fast.token_to_id("ð")]
    ids = BYTE_LEVEL.encode(" hello", False)
    assert joined(BYTE_LEVEL, broken, ids) == " hello"
