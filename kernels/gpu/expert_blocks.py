"""What the products over blocks of one expert have in common, whatever its weights are."""

from __future__ import annotations

import triton
import triton.language as tl

from ..clamped_swiglu import ClampedSwiGLU
from ..gated_activation import GatedActivation, silu_and_mul

_SILU, _GELU_TANH, _CLAMPED = 0, 1, 2  # as in `activate`


@triton.jit
def activate(gate, up, alpha, limit, ACT: tl.constexpr):
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
def block_of(
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
def load_inputs(row, k, size, EVEN_K: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """Inputs `k : k + BLOCK_K` of rows of `size`; zeros behind their end."""
    ks = k + tl.arange(0, BLOCK_K)[None, :]
    if EVEN_K:
        x = tl.load(row + ks)
    else:
        x = tl.load(row + ks, mask=ks < size, other=0.0)
    return x.to(tl.float32) if UPCAST else x


def activation(act: GatedActivation) -> tuple[int, float, float]:
    """What `activate` takes as `ACT`, `alpha` and `limit`."""
    if isinstance(act, ClampedSwiGLU):
        return _CLAMPED, act.alpha, act.limit
    return (_SILU if act is silu_and_mul else _GELU_TANH), 1.0, 1.0
