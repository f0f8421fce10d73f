"""Division of memory into blocks, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.actors.kv_allocator.sizing import KVCachePlan, kv_row_bytes, size_kv_cache
from octavo.messages.errors import KVCacheTooSmallError


def plan(**fields: Any) -> KVCachePlan:
    """Of 1,000 bytes, with 10 bytes a token in blocks of 4: 25 blocks of 40 bytes."""
    given: dict[str, Any] = {
        "kv_bytes": 1000,
        "bytes_per_token": 10,
        "block_size": 4,
        "num_blocks": None,
        "max_model_len": None,
        "max_position": 64,
        "max_num_seqs": 8,
    }
    return size_kv_cache(**{**given, **fields})


def test_memory_is_divided_into_whole_blocks() -> None:
    assert plan() == KVCachePlan(num_blocks=25, max_model_len=64, bytes_per_block=40)
    assert plan(kv_bytes=1039).num_blocks == 25
    assert plan(kv_bytes=1040).num_blocks == 26


def test_there_are_no_more_blocks_than_all_seats_at_full_length_can_hold() -> None:
    assert plan(kv_bytes=10**9).num_blocks == 8 * 16
    assert plan(kv_bytes=10**9, max_model_len=61).num_blocks == 8 * 16, "the last block is one though partly filled"
    assert plan(kv_bytes=10**9, max_model_len=60).num_blocks == 8 * 15
    assert plan(num_blocks=1000).num_blocks == 1000, "a number that is given is not judged"


def test_the_longest_sequence_is_what_the_checkpoint_the_operator_and_the_memory_allow() -> None:
    assert plan(max_model_len=1000).max_model_len == 64
    assert plan(max_model_len=30).max_model_len == 30
    assert plan(kv_bytes=400).max_model_len == 40


@pytest.mark.parametrize(("fields", "longest"), [({"max_model_len": 41}, 41), ({"max_model_len": 4096}, 64)])
def test_a_length_that_was_asked_for_and_does_not_fit_is_refused(fields: dict[str, Any], longest: int) -> None:
    with pytest.raises(KVCacheTooSmallError) as refused:
        plan(kv_bytes=400, **fields)
    assert f"{longest}" in str(refused.value)
    assert plan(kv_bytes=400, max_model_len=40).max_model_len == 40


def test_a_prompt_and_an_output_token_are_the_least() -> None:
    assert plan(block_size=1, num_blocks=2).max_model_len == 2
    for num_blocks in (0, 1):
        with pytest.raises(KVCacheTooSmallError):
            plan(block_size=1, num_blocks=num_blocks)


def test_a_quantised_row_carries_its_scale() -> None:
    assert kv_row_bytes(128, "bfloat16", 16) == 256
    assert kv_row_bytes(128, "int8", 8) == kv_row_bytes(128, "fp8", 8) == 132
