from __future__ import annotations

from fake_engine import BOS, EOS, FakeEngine
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from octavo.messages.request import TokenLogprobs


class WordEngine(FakeEngine):
    """Tokens that begin with a space, as tokenizers have that mark words so."""

    def token_bytes(self, token_id: int) -> bytes:
        return (b" one", b" two", b"!")[token_id]


def build(kind: type[FakeEngine]) -> FakeEngine:
    return kind()


@given(st.text(max_size=20), st.integers(1, 4))
def test_every_character_begins_where_the_first_of_its_bytes_is_told_to(text: str, num_deltas: int) -> None:
    text = text.encode(errors="ignore").decode()
    data = text.encode()
    offsets = TextOffsets(build(FakeEngine), True)
    told: list[int] = []
    for start in range(0, len(data), num_deltas):
        told += offsets.take(data[start : start + num_deltas], "")
    expected = [index for index, character in enumerate(text) for _ in character.encode()]
    assert told == expected


def test_special_tokens_take_no_room_unless_they_are_part_of_the_text() -> None:
    engine = build(FakeEngine)
    assert TextOffsets(engine, True).take([97, EOS, 98], "ab") == [0, 1, 1]
    assert TextOffsets(engine, False).take([97, EOS, 98], "a<257>b") == [0, 1, 6]
    assert TextOffsets(engine, True).take_prompt([BOS, 97], "a") == [0, 0]
    assert TextOffsets(engine, True).take_prompt([BOS, 97], "<256>a") == [0, 5]


def test_the_space_that_a_tokenizer_drops_at_the_start_is_not_counted() -> None:
    engine = build(WordEngine)
    assert TextOffsets(engine, True).take([0, 1, 2], "one two!") == [0, 3, 7]
    assert TextOffsets(engine, True).take([0, 1, 2], " one two!") == [0, 4, 8]


def test_output_begins_where_the_echoed_prompt_ends() -> None:
    offsets = TextOffsets(build(FakeEngine), True)
    assert offsets.take_prompt([BOS, 97, 98], "ab") == [0, 0, 1]
    assert offsets.take([99], "c") == [2]


def test_the_chosen_token_is_among_the_top_ones_and_infinities_are_numbers() -> None:
    entry = TokenLogprobs(99, float("-inf"), 9, ((97, -0.1), (98, float("-inf"))))
    logprobs = completion_logprobs([entry], [99], [0], build(FakeEngine), False)
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"a": -0.1, "b": -9999.0, "c": -9999.0}]
    assert chat_logprobs([entry], build(FakeEngine), False)[0]["bytes"] == [99]
