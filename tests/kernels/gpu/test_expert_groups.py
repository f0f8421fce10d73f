"""Routing, and grouping by expert, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.gpu.expert_groups import group, most_blocks, route
from octavo.kernels.mixture import route_ref

# The interpreter turns a loop's bounds from arrays of one element into numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.mark.parametrize(("of_chosen", "normalizes"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(1, 4, 2), (9, 5, 5), (6, 1, 1), (5, 128, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_routing_is_its_meaning(
    num_tokens: int, num_experts: int, num_chosen: int, of_chosen: bool, normalizes: bool, dtype: torch.dtype
) -> None:
    logits = 3 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens))
    logits = logits.to(dtype)
    weights, chosen = route(logits, num_chosen, of_chosen=of_chosen, normalizes=normalizes)
    expected_weights, expected = route_ref(logits, num_chosen, of_chosen=of_chosen, normalizes=normalizes)
    assert weights.dtype is torch.float32 and chosen.dtype is torch.int32
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)
    if dtype is torch.float32:  # no two are equal
        assert torch.equal(chosen.long(), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN is asked for
def test_of_equal_experts_the_first_are_taken_and_none_twice() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0], [float("-inf")] * 4 + [0.0], [float("nan")] * 5])
    weights, chosen = route(logits, 4)
    assert chosen[0].tolist() == [1, 2, 4, 0]
    assert chosen[1].tolist() == [4, 0, 1, 2] and weights[1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert sorted(set(chosen[2].tolist())) == sorted(chosen[2].tolist()) and weights[2].isnan().all()
    assert route(logits[:0], 2)[1].shape == (0, 2)
    with pytest.raises(ValueError, match="num_chosen=6 of 5 experts"):
        route(logits, 6)


@pytest.mark.parametrize("block_m", [4, 16])
@pytest.mark.parametrize(
    ("num_tokens", "num_chosen", "num_experts", "first"), [(2, 1, 3, 0), (7, 2, 4, 2), (40, 4, 6, 0), (300, 1, 3, 1)]
)
def test_grouping_puts_each_pair_once_into_a_block_of_its_expert(
    num_tokens: int, num_chosen: int, num_experts: int, first: int, block_m: int
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    chosen = torch.stack([torch.randperm(num_experts + 3, generator=generator)[:num_chosen] for _ in range(num_tokens)])
    chosen = (chosen - 1).to(torch.int32)  # -1 and what lies behind the stack are others'
    num_pairs = num_tokens * num_chosen
    grouping = group(chosen, num_experts, first, block_m)
    assert grouping.max_blocks == most_blocks(num_pairs, num_experts, block_m)
    experts = grouping.experts.tolist()
    used = [expert for expert in experts if expert >= 0]
    assert used == sorted(used) and experts[len(used) :] == [-1] * (len(experts) - len(used))
    found: list[int] = []
    for block, expert in enumerate(used):
        pairs = grouping.pairs[block * block_m : (block + 1) * block_m].tolist()
        there = [pair for pair in pairs if pair != num_pairs]
        assert there and pairs == there + [num_pairs] * (block_m - len(there)), "no block is without need"
        assert all(int(chosen.flatten()[pair]) == expert + first for pair in there)
        found.extend(there)
    expected = [
        pair for expert in range(num_experts) for pair in range(num_pairs) if chosen.flatten()[pair] == expert + first
    ]
    assert found == expected, "within an expert, in their order"


def test_there_are_never_more_blocks_than_are_made_room_for() -> None:
    for num_pairs in range(1, 60):
        for num_experts in (1, 3, 8):
            for block_m in (4, 16):
                worst = min(num_pairs, num_experts)  # one pair for each of so many, and the rest for one
                needed = worst - 1 + -(-(num_pairs - worst + 1) // block_m)
                assert needed <= most_blocks(num_pairs, num_experts, block_m)
