"""A mixture of experts on a GPU, unasked by the host: two products over tokens grouped by expert, and their sum.

`expert_groups` has put pairs of token and expert into blocks of one expert each. The first product activates what it
has computed before it stores it; the second puts each row where its pair belongs; the sum over a token's experts is
done in their order, not by atomics: the same input gives the same bits.

Source: Gale et al. 2023 (MegaBlocks), section 5, for products over blocks of one expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..clamped_swiglu import ClampedSwiGLU
from ..expert_stack import ExpertStack
from ..gated_activation import GatedActivation, silu_and_mul
from .expert_groups import Grouping, group
from .launch import UPCAST
from .mixture_tiles import tiles_for

_SILU, _GELU_TANH, _CLAMPED = 0, 1, 2  # as in `_activate`


@triton.jit
def _activate(gate, up, alpha, limit, ACT: tl.constexpr):
    if ACT == 0:
        return gate * tl.sigmoid(gate) * up
    elif ACT == 1:  # 0.5 * (1 + tanh(y)) is sigmoid(2 * y)
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        return (up + 1.0) * (gate * tl.sigmoid(alpha * gate))


@triton.jit
def _block_of(
    block,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    first,
    num_experts,
    IS_ONE_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The expert of a block, none if it is outside `0 <= expert < num_experts`, and its rows' pairs."""
    rows = tl.arange(0, BLOCK_M)
    expert = tl.load(experts_ptr + block)
    if IS_ONE_TOKEN:  # `experts` is what was chosen: no two the same, so that a block's one row is one pair
        expert -= first
        pairs = tl.where(rows == 0, block, num_pairs)
    else:
        pairs = tl.load(pairs_ptr + block * BLOCK_M + rows)
    return expert, pairs


@triton.jit
def _load_inputs(row, k, size, EVEN_K: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """Inputs `k : k + BLOCK_K` of rows of `size`; zeros behind their end."""
    ks = k + tl.arange(0, BLOCK_K)[None, :]
    if EVEN_K:
        x = tl.load(row + ks)
    else:
        x = tl.load(row + ks, mask=ks < size, other=0.0)
    return x.to(tl.float32) if UPCAST else x


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
    expert, pairs = _block_of(block, pairs_ptr, experts_ptr, num_pairs, first, num_experts, IS_ONE_TOKEN, BLOCK_M)
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
        x = _load_inputs(x_row, k, hidden_size, EVEN_K, UPCAST, BLOCK_K)
        of_gate = _load_inputs(gate_row, k, hidden_size, EVEN_K, UPCAST, BLOCK_K)
        of_up = _load_inputs(up_row, k, hidden_size, EVEN_K, UPCAST, BLOCK_K)
        gate = tl.dot(x, of_gate.T, gate, input_precision="ieee")
        up = tl.dot(x, of_up.T, up, input_precision="ieee")
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * 2 * inner + outs
        gate += tl.load(bias, mask=outs < inner, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + inner, mask=outs < inner, other=0.0).to(tl.float32)[None, :]
    said = _activate(gate, up, alpha, limit, ACT)
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
    expert, pairs = _block_of(block, pairs_ptr, experts_ptr, num_pairs, first, num_experts, IS_ONE_TOKEN, BLOCK_M)
    if (expert < 0) | (expert >= num_experts):
        return
    outs = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inner_row = inner_ptr + rows.to(tl.int64)[:, None] * inner
    weight_row = weight_ptr + (expert.to(tl.int64) * hidden_size + tl.minimum(outs, hidden_size - 1))[:, None] * inner
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, inner, BLOCK_K):
        x = _load_inputs(inner_row, k, inner, EVEN_K, UPCAST, BLOCK_K)
        weight = _load_inputs(weight_row, k, inner, EVEN_K, UPCAST, BLOCK_K)
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
    stack: ExpertStack,
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
    tiles = tiles_for(num_pairs, num_experts, x.element_size(), batch_invariant=batch_invariant)
    block_m, is_one_token = tiles.block_m, num_tokens == 1
    # A token's experts are all different: each gets a block, and there is nothing to group.
    grouping = (
        Grouping(chosen, chosen.view(-1), block_m) if is_one_token else group(chosen, num_experts, stack.first, block_m)
    )
    max_blocks = grouping.max_blocks
    between = torch.empty((max_blocks * block_m, inner), dtype=x.dtype, device=x.device)
    said = torch.empty((num_pairs, hidden_size), dtype=x.dtype, device=x.device)
    kind, alpha, limit = _activation(stack.act)
    block_n, block_k, num_warps, num_stages = tiles.up
    _up_kernel[(max_blocks * triton.cdiv(inner, block_n),)](
        *(x, stack.w13, stack.b13, between, grouping.pairs, grouping.experts, num_pairs, stack.first, num_experts),
        *(hidden_size, inner, x.stride(0), alpha, limit),
        NUM_CHOSEN=num_chosen,
        IS_ONE_TOKEN=is_one_token,
        HAS_BIAS=stack.b13 is not None,
        ACT=kind,
        EVEN_K=hidden_size % block_k == 0,
        UPCAST=UPCAST,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    block_n, block_k, num_warps, num_stages = tiles.down
    _down_kernel[(max_blocks * triton.cdiv(hidden_size, block_n),)](
        *(between, stack.w2, stack.b2, said, grouping.pairs, grouping.experts, num_pairs, stack.first, num_experts),
        *(hidden_size, inner),
        IS_ONE_TOKEN=is_one_token,
        HAS_BIAS=stack.b2 is not None,
        EVEN_K=inner % block_k == 0,
        UPCAST=UPCAST,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    block = min(1024, triton.next_power_of_2(hidden_size))
    _combine_kernel[num_tokens, triton.cdiv(hidden_size, block)](
        *(said, weights, chosen, out, stack.first, num_experts, hidden_size),
        NUM_CHOSEN=num_chosen,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _activation(act: GatedActivation) -> tuple[int, float, float]:
    if isinstance(act, ClampedSwiGLU):
        return _CLAMPED, act.alpha, act.limit
    return (_SILU if act is silu_and_mul else _GELU_TANH), 1.0, 1.0


def _check(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: ExpertStack) -> None:
    if x.shape[1] != stack.w13.shape[2] or x.dtype is not stack.w13.dtype or x.dtype is not stack.w2.dtype:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, the experts are {stack.w13.dtype} {list(stack.w13.shape)}: they must be "
            "of one dtype and fit each other"
        )
    if weights.shape != chosen.shape or chosen.dim() != 2 or chosen.shape[0] != x.shape[0]:
        raise ValueError(f"weights {list(weights.shape)} and chosen {list(chosen.shape)} are for {x.shape[0]} tokens")
    if not stack.w13.is_contiguous() or not stack.w2.is_contiguous():
        raise ValueError("the experts must lie behind each other, contiguous")
