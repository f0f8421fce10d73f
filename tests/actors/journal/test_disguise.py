from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.journal.disguise import TokenDisguise, expand_marks, num_mark_bytes

KEY = b"0123456789abcdef"
tokens = st.lists(st.integers(0, 2), max_size=24)


def pack(token_ids: list[int]) -> bytes:
    return array("i", token_ids).tobytes()


def common_blocks(left: bytes, right: bytes, block_size: int) -> int:
    size = 4 * block_size
    num = 0
    while (num + 1) * size <= min(len(left), len(right)) and left[: (num + 1) * size] == right[: (num + 1) * size]:
        num += 1
    return num


@given(tokens, tokens, st.integers(1, 5))
def test_disguised_sequences_share_exactly_the_blocks_that_real_ones_share(
    left: list[int], right: list[int], block_size: int
) -> None:
    disguise = TokenDisguise(block_size, KEY).disguise
    real = common_blocks(pack(left), pack(right), block_size)
    assert common_blocks(disguise(pack(left)), disguise(pack(right)), block_size) == real


@given(tokens, tokens, st.integers(1, 5))
def test_a_block_in_another_place_or_after_another_history_looks_different(
    left: list[int], right: list[int], block_size: int
) -> None:
    disguise = TokenDisguise(block_size, KEY).disguise
    size = 4 * block_size
    seen: dict[bytes, bytes] = {}  # disguised block -> real history up to its end
    for sequence in (pack(left), pack(right)):
        disguised = disguise(sequence)
        for end in range(size, len(sequence) + 1, size):
            history = sequence[:end]
            assert seen.setdefault(disguised[end - size : end], history) == history


@given(tokens, st.integers(0, 24), st.integers(1, 5))
def test_tokens_one_by_one_give_what_all_at_once_gives(token_ids: list[int], split: int, block_size: int) -> None:
    disguise = TokenDisguise(block_size, KEY)
    known, later = token_ids[:split], token_ids[split:]
    chain, marks = disguise.begin(pack(known))
    one_by_one = expand_marks(marks, len(known), block_size) + pack([disguise.extend(chain, t) for t in later])
    assert one_by_one == disguise.disguise(pack(token_ids))


@given(tokens, st.integers(1, 5))
def test_marks_have_the_length_that_is_expected_of_them(token_ids: list[int], block_size: int) -> None:
    marks = TokenDisguise(block_size, KEY).begin(pack(token_ids))[1]
    assert len(marks) == num_mark_bytes(len(token_ids), block_size)
    disguised = array("i", expand_marks(marks, len(token_ids), block_size))
    assert len(disguised) == len(token_ids)
    assert all(token >= 0 for token in disguised)
    with pytest.raises(ValueError, match="marks"):
        expand_marks(marks + b"1234", len(token_ids), block_size)


def test_another_key_gives_other_marks_and_no_key_tells_itself() -> None:
    prompt = pack(list(range(64)))
    one, other = TokenDisguise(16, KEY), TokenDisguise(16, b"another key.....")
    assert one.disguise(prompt) != other.disguise(prompt)
    assert one.key_id != other.key_id
    assert KEY not in one.key_id
    assert one.salt("tenant") != other.salt("tenant")
    assert one.salt("") == ""
