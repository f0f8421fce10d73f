"""Which experts each token goes to, and those pairs put behind each other by expert, without a word from the host.

A pair is a token and one of the experts that it goes to: pair `token * num_chosen + j`. Each expert's pairs are filled
up to a whole number of blocks of BLOCK_M rows, so that a program of a product over them has one expert's weights. How
many blocks there can be at most follows from the number of pairs; blocks that nobody needs are marked as such.

Source: Gale et al. 2023 (MegaBlocks), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import is_interpreted

PAIRS_AT_ONCE = 64 if is_interpreted() else 1024
_MOST_SEGMENTS = 16  # that pairs are counted in, side by side; a power of two


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr,  # [num_tokens, num_experts], rows `stride` apart
    weights_ptr,  # [num_tokens, NUM_CHOSEN] float32
    chosen_ptr,  # [num_tokens, NUM_CHOSEN] int32
    num_tokens,
    num_experts,
    stride,
    OF_CHOSEN: tl.constexpr,
    NORMALIZES: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two, >= num_experts
    PLACES: tl.constexpr,  # power of two, >= NUM_CHOSEN
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, EXPERTS)
    places = tl.arange(0, PLACES)
    is_expert = (experts < num_experts)[None, :]
    at = logits_ptr + tokens.to(tl.int64)[:, None] * stride + experts[None, :]
    logits = tl.load(at, mask=(tokens < num_tokens)[:, None] & is_expert, other=float("-inf")).to(tl.float32)
    logits = tl.where((tokens < num_tokens)[:, None] | ~is_expert, logits, 0.0)  # no NaN in rows that are not there
    # What is left to choose from: below all finite numbers are only experts that have been chosen, or do not exist.
    left = tl.where(is_expert, tl.where(logits > -3.0e38, logits, -3.0e38), float("-inf"))
    best = tl.zeros((TOKENS, PLACES), dtype=tl.float32)
    chosen = tl.zeros((TOKENS, PLACES), dtype=tl.int32)
    for place in tl.static_range(NUM_CHOSEN):
        expert = tl.argmax(left, axis=1, tie_break_left=True).to(tl.int32)
        is_it = experts[None, :] == expert[:, None]
        logit = tl.sum(tl.where(is_it, logits, 0.0), axis=1)
        best = tl.where((places == place)[None, :], logit[:, None], best)
        chosen = tl.where((places == place)[None, :], expert[:, None], chosen)
        left = tl.where(is_it, float("-inf"), left)
    is_place = (places < NUM_CHOSEN)[None, :]
    if OF_CHOSEN:
        highest = tl.max(tl.where(is_place, best, float("-inf")), axis=1)
        weights = tl.where(is_place, tl.exp(best - highest[:, None]), 0.0)
        weights = weights / tl.sum(weights, axis=1)[:, None]
    else:
        highest = tl.max(logits, axis=1)
        weights = tl.where(is_place, tl.exp(best - highest[:, None]), 0.0)
        weights = weights / tl.sum(tl.exp(logits - highest[:, None]), axis=1)[:, None]
        if NORMALIZES:
            weights = weights / tl.sum(weights, axis=1)[:, None]
    to = tokens.to(tl.int64)[:, None] * NUM_CHOSEN + places[None, :]
    mask = (tokens < num_tokens)[:, None] & is_place
    tl.store(weights_ptr + to, weights, mask=mask)
    tl.store(chosen_ptr + to, chosen, mask=mask)


def route(
    logits: torch.Tensor, num_chosen: int, *, of_chosen: bool = False, normalizes: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.mixture.route`; of equal logits that of the lower number is taken first."""
    num_tokens, num_experts = logits.shape
    if not 1 <= num_chosen <= num_experts:
        raise ValueError(f"num_chosen={num_chosen} of {num_experts} experts")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    weights = torch.empty((num_tokens, num_chosen), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((num_tokens, num_chosen), dtype=torch.int32, device=logits.device)
    if num_tokens:
        tokens = 4 if num_experts <= 256 else 1
        _route_kernel[(triton.cdiv(num_tokens, tokens),)](
            *(logits, weights, chosen, num_tokens, num_experts, logits.stride(0)),
            OF_CHOSEN=of_chosen,
            NORMALIZES=normalizes,
            NUM_CHOSEN=num_chosen,
            EXPERTS=triton.next_power_of_2(num_experts),
            PLACES=triton.next_power_of_2(num_chosen),
            TOKENS=tokens,
            num_warps=4,
        )
    return weights, chosen


@triton.jit(do_not_specialize=["num_pairs", "pairs_per_segment", "first"])
def _count_kernel(
    chosen_ptr,  # [num_pairs] int32
    counts_ptr,  # [num_segments, num_experts] int32
    num_pairs,
    pairs_per_segment,  # a multiple of AT_ONCE
    first,
    num_experts,
    AT_ONCE: tl.constexpr,
):
    expert, segment = tl.program_id(0), tl.program_id(1)
    begin = segment * pairs_per_segment
    end = tl.minimum(begin + pairs_per_segment, num_pairs)
    count = tl.zeros((AT_ONCE,), dtype=tl.int32)
    for start in range(begin, end, AT_ONCE):
        pairs = start + tl.arange(0, AT_ONCE)
        chosen = tl.load(chosen_ptr + pairs, mask=pairs < end, other=-1)
        count += ((chosen == expert + first) & (pairs < end)).to(tl.int32)
    tl.store(counts_ptr + segment * num_experts + expert, tl.sum(count))


@triton.jit(do_not_specialize=["num_pairs", "pairs_per_segment", "num_segments", "first", "max_blocks"])
def _group_kernel(
    chosen_ptr,  # [num_pairs] int32
    counts_ptr,  # [SEGMENTS, num_experts] int32; not read where there is one
    pairs_ptr,  # [max_blocks * BLOCK_M] int32: the pair of each row, num_pairs for none
    experts_ptr,  # [max_blocks] int32: the expert of each block, -1 for none
    num_pairs,
    pairs_per_segment,
    num_segments,
    first,
    num_experts,
    max_blocks,
    IS_ONE: tl.constexpr,  # one segment, of at most AT_ONCE pairs
    SEGMENTS: tl.constexpr,  # >= num_segments
    EXPERTS: tl.constexpr,  # power of two, > num_experts
    BLOCK_M: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    expert, segment = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, EXPERTS)
    if IS_ONE:
        pairs = tl.arange(0, AT_ONCE)
        chosen = tl.load(chosen_ptr + pairs, mask=pairs < num_pairs, other=-1) - first
        is_mine = (pairs < num_pairs) & (chosen >= 0) & (chosen < num_experts)
        totals = tl.histogram(tl.where(is_mine, chosen, num_experts), EXPERTS)
        totals = tl.where(experts < num_experts, totals, 0)
        before = 0
    else:
        segments = tl.arange(0, SEGMENTS)
        counts = tl.load(
            counts_ptr + segments[:, None] * num_experts + experts[None, :],
            mask=(segments < num_segments)[:, None] & (experts < num_experts)[None, :],
            other=0,
        )
        totals = tl.sum(counts, axis=0)
        is_before = (segments < segment)[:, None] & (experts == expert)[None, :]
        before = tl.sum(tl.sum(tl.where(is_before, counts, 0), axis=0), axis=0)
    blocks = (totals + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(experts < expert, blocks, 0), axis=0)
    my_blocks = tl.sum(tl.where(experts == expert, blocks, 0), axis=0)
    total = tl.sum(tl.where(experts == expert, totals, 0), axis=0)
    row = first_block * BLOCK_M + before

    begin = segment * pairs_per_segment
    end = tl.minimum(begin + pairs_per_segment, num_pairs)
    for start in range(begin, end, AT_ONCE):
        pairs = start + tl.arange(0, AT_ONCE)
        is_it = (tl.load(chosen_ptr + pairs, mask=pairs < end, other=-1) == expert + first) & (pairs < end)
        place = tl.cumsum(is_it.to(tl.int32), axis=0)  # within an expert, pairs stay in their order
        tl.store(pairs_ptr + row + place - 1, pairs, mask=is_it)
        row += tl.sum(is_it.to(tl.int32), axis=0)

    if segment == 0:
        rows = first_block * BLOCK_M + total + tl.arange(0, BLOCK_M)
        tl.store(pairs_ptr + rows, num_pairs, mask=rows < (first_block + my_blocks) * BLOCK_M)
        for start in range(0, my_blocks, AT_ONCE):
            block = start + tl.arange(0, AT_ONCE)
            tl.store(experts_ptr + first_block + block, expert, mask=block < my_blocks)
        if expert == num_experts - 1:
            for start in range(first_block + my_blocks, max_blocks, AT_ONCE):
                block = start + tl.arange(0, AT_ONCE)
                tl.store(experts_ptr + block, -1, mask=block < max_blocks)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which rows of which blocks stand for which pairs.

    Attributes:
        pairs: `[max_blocks * block_m]` int32: the pair of each row, `num_pairs` for none.
        experts: `[max_blocks]` int32: the expert of each block, counted from the stack's first; -1 for none.
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    block_m: int

    @property
    def max_blocks(self) -> int:
        return self.experts.shape[0]


def most_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Blocks that suffice, however the pairs fall: each expert but wastes less than one."""
    return min(num_pairs, (num_pairs + num_experts * (block_m - 1)) // block_m)


def group(chosen: torch.Tensor, num_experts: int, first: int, block_m: int) -> Grouping:
    """Put pairs behind each other by expert.

    Args:
        chosen: `[num_tokens, num_chosen]` int32, contiguous, not empty; what is not from `first` on one of
            `num_experts` is left out.
    """
    num_pairs = chosen.numel()
    max_blocks = most_blocks(num_pairs, num_experts, block_m)
    pairs = torch.empty((max_blocks * block_m,), dtype=torch.int32, device=chosen.device)
    experts = torch.empty((max_blocks,), dtype=torch.int32, device=chosen.device)
    steps = triton.cdiv(num_pairs, PAIRS_AT_ONCE)
    num_segments = min(steps, _MOST_SEGMENTS)
    per_segment = triton.cdiv(steps, num_segments) * PAIRS_AT_ONCE
    num_segments = triton.cdiv(num_pairs, per_segment)
    counts = experts  # one segment is counted where it is grouped
    if num_segments > 1:
        counts = torch.empty((num_segments, num_experts), dtype=torch.int32, device=chosen.device)
        _count_kernel[num_experts, num_segments](
            *(chosen, counts, num_pairs, per_segment, first, num_experts), AT_ONCE=PAIRS_AT_ONCE, num_warps=4
        )
    _group_kernel[num_experts, num_segments](
        *(chosen, counts, pairs, experts, num_pairs, per_segment, num_segments, first, num_experts, max_blocks),
        IS_ONE=num_segments == 1,
        SEGMENTS=_MOST_SEGMENTS,
        EXPERTS=triton.next_power_of_2(num_experts + 1),
        BLOCK_M=block_m,
        AT_ONCE=PAIRS_AT_ONCE,
        num_warps=4,
    )
    return Grouping(pairs, experts, block_m)
