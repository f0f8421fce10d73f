"""A mixture of experts on a GPU, unasked by the host: two products over tokens grouped by expert, and their sum.

`expert_groups` has put pairs of token and expert into blocks of one expert each. The first product activates what it
has computed before it stores it; the second puts each row where its pair belongs; the sum over a token's experts is
done in their order, not by atomics: the same input gives the same bits.

Source: Gale et al. 2023 (MegaBlocks), section 5, for products over blocks of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from ..expert_stack import AnyExpertStack, ExpertStack
from . import mixture_codes
from .expert_blocks import activate, activation, block_of, load_inputs
from .expert_groups import Grouping, group
from .launch import UPCAST
from .mixture_tiles import Tiles, code_tiles_for, tiles_for


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _up_kernel(
    x_ptr,  # [num_tokens, hidden_size], rows `x_stride` apart
    weight_ptr,  # [num_experts, 2 * inner, hidden_size], contiguous
    bias_ptr,  # [num_experts, 2 * inner]
    inner_ptr,  # [max_blocks * BLOCK_M, inner]
    pairs_ptr,
    experts_ptr,
    num_pairs,
    first,
    num_experts,
    hidden_size,
    inner,
    x_stride,
    alpha,
    limit,
    NUM_CHOSEN: tl.constexpr,
    IS_ONE_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n = tl.cdiv(inner, BLOCK_N)
    block = tl.program_id(0) // num_n
    expert, pairs = block_of(block, pairs_ptr, experts_ptr, num_pairs, first, num_experts, IS_ONE_TOKEN, BLOCK_M)
    if (expert < 0) | (expert >= num_experts):
        return
    outs = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows of no pair compute some pair's numbers again, and outputs behind the last that of the last: neither is read.
    tokens = tl.minimum(pairs, num_pairs - 1) // NUM_CHOSEN
    x_row = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
    gate_row = weight_ptr + (expert.to(tl.int64) * 2 * inner + tl.minimum(outs, inner - 1))[:, None] * hidden_size
    up_row = gate_row + inner.to(tl.int64) * hidden_size
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        x = load_inputs(x_row, k, hidden_size, EVEN_K, UPCAST, BLOCK_K)
        of_gate = load_inputs(gate_row, k, hidden_size, EVEN_K, UPCAST, BLOCK_K)
        of_up = load_inputs(up_row, k, hidden_size, EVEN_K, UPCAST, BLOCK_K)
        gate = tl.dot(x, of_gate.T, gate, input_precision="ieee")
        up = tl.dot(x, of_up.T, up, input_precision="ieee")
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * 2 * inner + outs
        gate += tl.load(bias, mask=outs < inner, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + inner, mask=outs < inner, other=0.0).to(tl.float32)[None, :]
    said = activate(gate, up, alpha, limit, ACT)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    to = inner_ptr + rows.to(tl.int64)[:, None] * inner + outs[None, :]
    tl.store(to, said.to(inner_ptr.dtype.element_ty), mask=(outs < inner)[None, :])


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _down_kernel(
    inner_ptr,  # [max_blocks * BLOCK_M, inner]
    weight_ptr,  # [num_experts, hidden_size, inner], contiguous
    bias_ptr,  # [num_experts, hidden_size]
    said_ptr,  # [num_pairs, hidden_size]
    pairs_ptr,
    experts_ptr,
    num_pairs,
    first,
    num_experts,
    hidden_size,
    inner,
    IS_ONE_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n = tl.cdiv(hidden_size, BLOCK_N)
    block = tl.program_id(0) // num_n
    expert, pairs = block_of(block, pairs_ptr, experts_ptr, num_pairs, first, num_experts, IS_ONE_TOKEN, BLOCK_M)
    if (expert < 0) | (expert >= num_experts):
        return
    outs = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inner_row = inner_ptr + rows.to(tl.int64)[:, None] * inner
    weight_row = weight_ptr + (expert.to(tl.int64) * hidden_size + tl.minimum(outs, hidden_size - 1))[:, None] * inner
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, inner, BLOCK_K):
        x = load_inputs(inner_row, k, inner, EVEN_K, UPCAST, BLOCK_K)
        weight = load_inputs(weight_row, k, inner, EVEN_K, UPCAST, BLOCK_K)
        total = tl.dot(x, weight.T, total, input_precision="ieee")
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * hidden_size + outs
        total += tl.load(bias, mask=outs < hidden_size, other=0.0).to(tl.float32)[None, :]
    to = said_ptr + pairs.to(tl.int64)[:, None] * hidden_size + outs[None, :]
    mask = (pairs < num_pairs)[:, None] & (outs < hidden_size)[None, :]
    tl.store(to, total.to(said_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def _combine_kernel(
    said_ptr,  # [num_tokens * NUM_CHOSEN, hidden_size]; of pairs whose expert is not here nothing was written
    weights_ptr,  # [num_tokens, NUM_CHOSEN]
    chosen_ptr,  # [num_tokens, NUM_CHOSEN] int32
    out_ptr,  # [num_tokens, hidden_size]
    first,
    num_experts,
    hidden_size,
    NUM_CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + j
        expert = tl.load(chosen_ptr + pair) - first
        mask = (columns < hidden_size) & (expert >= 0) & (expert < num_experts)
        said = tl.load(said_ptr + pair.to(tl.int64) * hidden_size + columns, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, said * tl.load(weights_ptr + pair).to(tl.float32), 0.0)
    to = out_ptr + token.to(tl.int64) * hidden_size + columns
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=columns < hidden_size)


def mixture(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    stack: AnyExpertStack,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """See `kernels.mixture.mixture`."""
    (num_tokens, hidden_size), num_chosen = x.shape, chosen.shape[1]
    num_experts, _, inner = stack.w2.shape
    _check(x, weights, chosen, stack)
    out = torch.empty((num_tokens, hidden_size), dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    weights, chosen = weights.contiguous(), chosen.to(torch.int32).contiguous()
    num_pairs = chosen.numel()
    block_m, multiply = _way(stack, num_pairs, x.element_size(), batch_invariant=batch_invariant)
    # A token's experts are all different: each gets a block, and there is nothing to group.
    grouping = (
        Grouping(chosen, chosen.view(-1), block_m)
        if num_tokens == 1
        else group(chosen, num_experts, stack.first, block_m)
    )
    between = torch.empty((grouping.max_blocks * block_m, inner), dtype=x.dtype, device=x.device)
    said = torch.empty((num_pairs, hidden_size), dtype=x.dtype, device=x.device)
    multiply(x, grouping, between, said, num_chosen=num_chosen)
    block = min(1024, triton.next_power_of_2(hidden_size))
    _combine_kernel[num_tokens, triton.cdiv(hidden_size, block)](
        *(said, weights, chosen, out, stack.first, num_experts, hidden_size),
        NUM_CHOSEN=num_chosen,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _way(
    stack: AnyExpertStack, num_pairs: int, itemsize: int, *, batch_invariant: bool
) -> tuple[int, Callable[..., None]]:
    """How many rows a block has, and what does both products over such blocks."""
    sizes = num_pairs, stack.w2.shape[0], itemsize
    if isinstance(stack, ExpertStack):
        tiles = tiles_for(*sizes, batch_invariant=batch_invariant)
        return tiles.block_m, partial(_multiply, stack=stack, tiles=tiles)
    code_tiles = code_tiles_for(*sizes, batch_invariant=batch_invariant)
    return code_tiles.block_m, partial(mixture_codes.multiply, stack=stack, tiles=code_tiles)


def _multiply(
    x: torch.Tensor,
    grouping: Grouping,
    between: torch.Tensor,
    said: torch.Tensor,
    *,
    stack: ExpertStack,
    tiles: Tiles,
    num_chosen: int,
) -> None:
    """As `mixture_codes.multiply`, of floating weights."""
    (num_tokens, hidden_size), (num_experts, _, inner) = x.shape, stack.w2.shape
    num_pairs, is_one_token = num_tokens * num_chosen, num_tokens == 1
    kind, alpha, limit = activation(stack.act)
    tables = (grouping.pairs, grouping.experts, num_pairs, stack.first, num_experts, hidden_size, inner)
    block_n, block_k, num_warps, num_stages = tiles.up
    _up_kernel[(grouping.max_blocks * triton.cdiv(inner, block_n),)](
        *(x, stack.w13, stack.b13, between, *tables, x.stride(0), alpha, limit),
        NUM_CHOSEN=num_chosen,
        IS_ONE_TOKEN=is_one_token,
        HAS_BIAS=stack.b13 is not None,
        ACT=kind,
        EVEN_K=hidden_size % block_k == 0,
        UPCAST=UPCAST,
        BLOCK_M=tiles.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    block_n, block_k, num_warps, num_stages = tiles.down
    _down_kernel[(grouping.max_blocks * triton.cdiv(hidden_size, block_n),)](
        *(between, stack.w2, stack.b2, said, *tables),
        IS_ONE_TOKEN=is_one_token,
        HAS_BIAS=stack.b2 is not None,
        EVEN_K=inner % block_k == 0,
        UPCAST=UPCAST,
        BLOCK_M=tiles.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _check(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: AnyExpertStack) -> None:
    if weights.shape != chosen.shape or chosen.dim() != 2 or chosen.shape[0] != x.shape[0]:
        raise ValueError(f"weights {list(weights.shape)} and chosen {list(chosen.shape)} are for {x.shape[0]} tokens")
    # Codes multiply any.
    dtypes: tuple[torch.dtype, ...] = (x.dtype,)
    if isinstance(stack, ExpertStack):
        dtypes = (stack.w13.dtype, stack.w2.dtype)
        if not (stack.w13.is_contiguous() and stack.w2.is_contiguous()):
            raise ValueError("the experts must lie behind each other, contiguous")
    if x.shape[1] != stack.w13.shape[2] or any(dtype is not x.dtype for dtype in dtypes):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, the experts are {dtypes[0]} {list(stack.w13.shape)}: they must be "
            "of one dtype and fit each other"
        )
