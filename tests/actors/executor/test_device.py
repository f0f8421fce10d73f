"""How memory is divided into KV blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.device import plan_kv_cache, resolve_device
from octavo.actors.kv_allocator.sizing import KVCachePlan
from octavo.messages.errors import KVCacheTooSmallError


def plan(
    *, bytes_per_token: int = 100, max_position: int = 1000, free_bytes: int = 10**9, **fields: Any
) -> KVCachePlan:
    config = ExecutorConfig(model_path="unused", **fields)
    return plan_kv_cache(config, bytes_per_token=bytes_per_token, max_position=max_position, free_bytes=free_bytes)


def test_an_exact_number_of_blocks_is_taken_as_it_is() -> None:
    assert plan(num_blocks=100, block_size=16) == KVCachePlan(num_blocks=100, max_model_len=1000, bytes_per_block=1600)


def test_given_memory_is_divided_into_whole_blocks() -> None:
    assert plan(kv_cache_memory_bytes=16_000, block_size=16).num_blocks == 10
    assert plan(kv_cache_memory_bytes=15_999, block_size=16).num_blocks == 9


def test_measured_memory_is_taken_by_its_share() -> None:
    assert plan(free_bytes=32_000, block_size=16).num_blocks == 10  # half, unless told
    assert plan(free_bytes=32_000, memory_utilization=1.0, block_size=16).num_blocks == 20


def test_no_more_is_taken_than_all_seats_can_fill() -> None:
    assert plan(max_num_seqs=3, max_model_len=33, block_size=16).num_blocks == 3 * 3
    assert plan(max_num_seqs=3, max_model_len=33, block_size=16, kv_cache_memory_bytes=10**12).num_blocks == 9


def test_the_context_is_lowered_to_what_the_cache_holds_unless_it_was_asked_for() -> None:
    assert plan(num_blocks=4, block_size=16).max_model_len == 64
    assert plan(num_blocks=4, block_size=16, max_model_len=64).max_model_len == 64
    with pytest.raises(KVCacheTooSmallError, match=r"max_model_len=65 .* 4 KV blocks of 16.* to 64") as caught:
        plan(num_blocks=4, block_size=16, max_model_len=65)
    assert caught.value.max_model_len_possible == 64


def test_the_context_is_never_longer_than_the_checkpoint_s() -> None:
    assert plan(max_model_len=5000, max_position=1000).max_model_len == 1000


@pytest.mark.parametrize("fields", [{"kv_cache_memory_bytes": 1599}, {"free_bytes": 3199}, {"free_bytes": 0}])
def test_memory_for_not_even_one_block_is_an_error_that_says_how_much_it_takes(fields: dict[str, int]) -> None:
    with pytest.raises(KVCacheTooSmallError, match="more memory") as caught:
        plan(block_size=16, **fields)
    assert "lower --max-model-len to 0" not in str(caught.value)  # that would be no help
    assert "1600 bytes" in str(caught.value)


def test_one_slot_is_too_little_for_a_prompt_and_an_answer() -> None:
    with pytest.raises(KVCacheTooSmallError):
        plan(num_blocks=1, block_size=1)


@given(
    free=st.integers(0, 10**8),
    per_token=st.integers(1, 10**4),
    block_size=st.integers(1, 256),
    seats=st.integers(1, 300),
    asked=st.none() | st.integers(2, 5000),
)
def test_a_plan_holds_its_longest_sequence_and_fits_its_memory(
    free: int, per_token: int, block_size: int, seats: int, asked: int | None
) -> None:
    try:
        found = plan(
            free_bytes=free, bytes_per_token=per_token, block_size=block_size, max_num_seqs=seats, max_model_len=asked
        )
    except KVCacheTooSmallError as error:
        assert error.max_model_len_possible < (asked or 2)
        return
    assert found.num_blocks * found.bytes_per_block <= free // 2
    assert 2 <= found.max_model_len <= found.num_blocks * block_size
    assert asked is None or found.max_model_len == min(asked, 1000)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_executors_of_a_host_take_its_gpus_in_turn_and_who_was_given_no_place_the_current_one(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    current = [2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.append(index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    assert resolve_device(asked) == torch.device("cuda", 2)
    assert [resolve_device(asked, gpu).index for gpu in range(5)] == [0, 1, 2, 0, 1]
    assert resolve_device("cpu", 1) == torch.device("cpu")
