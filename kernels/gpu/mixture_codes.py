"""The two products of a mixture whose experts' weights stay codes, dequantised in registers on their way to the tensor
cores: what is read of an expert are its codes and scales, whatever the number of tokens.

A program multiplies 64 or 128 outputs by one block's tokens, weights from the left: so they come from registers, and
blocks of 16 tokens fill the tensor cores' instructions as well. Weights are rounded to the dtype of the tokens once;
those of MXFP4 are exact in bfloat16.

Source: Open Compute Project 2023 (Microscaling Formats), sections 5.3.3 (E2M1) and 5.4.1 (E8M0). `kernels.expert_codes`
says how codes lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..expert_codes import PARTS, WIDTH, ExpertCodes
from ..expert_stack import CodedExpertStack
from .expert_blocks import activate, activation, block_of, load_inputs
from .expert_groups import Grouping
from .launch import UPCAST
from .linear_quantized import _as_floats, _zeros_of
from .mixture_tiles import CodeTiles


def _bfloat16_bits(part: int) -> str:
    """PTX for two words at a time, side by side in 32 bits: bits of a bfloat16 that is 2^-126 of a quarter's code.

    The sign goes to the highest bit, exponent and mantissa to where a bfloat16 has its lowest of each; what crosses
    from one word to the other is cut off. Triton would do this for each word by itself: three times as many operations.
    """
    low = 4 * part - 6  # how far down exponent and mantissa go; below 0: up
    move = f"shr.b32 low, $1, {low};" if low > 0 else f"shl.b32 low, $1, {-low};"
    return (
        "{ .reg .b32 low; .reg .b32 sign; "
        f"{move} and.b32 low, low, 0x01C001C0; "
        f"shl.b32 sign, $1, {12 - 4 * part}; and.b32 sign, sign, 0x80008000; or.b32 $0, low, sign; }}"
    )


_BFLOAT16_BITS: tl.constexpr = tl.constexpr(tuple(_bfloat16_bits(part) for part in range(PARTS[4])))


@triton.jit
def _bfloat16_power_bits(exponents, PART: tl.constexpr):
    """`[BLOCK_N]` int16: what makes weights of the bits of a quarter's codes, which as bfloat16 are 2^-126 of them."""
    return ((((exponents >> (8 * PART)) & 255) + 126) << 7).to(tl.int16)


@triton.jit
def _e2m1(words, exponents, PART: tl.constexpr, dtype: tl.constexpr):
    """A quarter of a unit of MXFP4, `[BLOCK_N, 32]`: of words of four codes, and of four exponents of each output."""
    if dtype == tl.bfloat16:  # no conversion, and one multiplication, by 2^-1 to 2^127: exact
        bits = tl.inline_asm_elementwise(_BFLOAT16_BITS[PART], "=r,r", [words], tl.int16, is_pure=True, pack=2)
        power = _bfloat16_power_bits(exponents, PART).to(tl.bfloat16, bitcast=True)
        return bits.to(tl.bfloat16, bitcast=True) * power[:, None]
    else:  # as float16 they are 2^-14 of the value
        code = words >> (4 * PART)
        value = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.float16, bitcast=True).to(tl.float32)
        power = ((((exponents >> (8 * PART)) & 255) + 14) << 23).to(tl.float32, bitcast=True)
        return (value * power[:, None]).to(dtype)


@triton.jit
def _scaled(
    stored,
    scales_ptr,
    zeros_ptr,
    at,  # [BLOCK_N]: where the tile's scales stand
    PART: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    dtype: tl.constexpr,
):
    """A tile `[BLOCK_N, 32]` of whole numbers with a scale and a zero for each output."""
    scale = tl.load(scales_ptr + at).to(tl.float32)
    zero = _zeros_of(zeros_ptr, at, at >= 0, HAS_ZEROS, False, BITS)[:, None]
    if BITS == 4:
        code = _as_floats(stored, 4 * PART, zero, dtype)
    else:
        code = stored.to(dtype) - zero.to(dtype)  # exact: of at most 8 bits
    return (code.to(tl.float32) * scale[:, None]).to(dtype)


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _codes_up_kernel(
    x_ptr,  # [num_tokens, hidden_size], rows `x_stride` apart
    codes_ptr,  # [num_experts, num_units, 2 * inner, 32]
    scales_ptr,  # [num_experts, num_groups, 2 * inner]; a group of MXFP4 is a unit
    zeros_ptr,  # likewise, int16
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
    num_units,
    num_groups,
    group_size,
    alpha,
    limit,
    NUM_CHOSEN: tl.constexpr,
    IS_ONE_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ACT: tl.constexpr,
    IS_MXFP4: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    num_n = tl.cdiv(inner, BLOCK_N)
    block = tl.program_id(0) // num_n
    expert, pairs = block_of(block, pairs_ptr, experts_ptr, num_pairs, first, num_experts, IS_ONE_TOKEN, BLOCK_M)
    if (expert < 0) | (expert >= num_experts):
        return
    outs = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows of no pair compute some pair's numbers again, and outputs behind the last that of the last: neither is read.
    tokens = tl.minimum(pairs, num_pairs - 1) // NUM_CHOSEN
    x_row = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
    out = tl.minimum(outs, inner - 1)
    of_unit = expert.to(tl.int64) * num_units * 2 * inner + out
    of_group = expert.to(tl.int64) * num_groups * 2 * inner + out
    columns = tl.arange(0, 32)[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for unit in range(0, num_units):
        at = of_unit + unit * 2 * inner
        gate_codes = tl.load(codes_ptr + at[:, None] * 32 + columns)
        up_codes = tl.load(codes_ptr + (at + inner)[:, None] * 32 + columns)
        if IS_MXFP4:
            gate_exponents, up_exponents = tl.load(scales_ptr + at), tl.load(scales_ptr + at + inner)
        for part in tl.static_range(PARTS):
            k = (unit * PARTS + part) * 32
            x = load_inputs(x_row, k, hidden_size, EVEN_K, UPCAST, 32)
            if IS_MXFP4:
                gate_weight = _e2m1(gate_codes, gate_exponents, part, dtype)
                up_weight = _e2m1(up_codes, up_exponents, part, dtype)
            else:
                group = of_group + tl.minimum(k // group_size, num_groups - 1) * 2 * inner
                gate_weight = _scaled(gate_codes, scales_ptr, zeros_ptr, group, part, BITS, HAS_ZEROS, dtype)
                up_weight = _scaled(up_codes, scales_ptr, zeros_ptr, group + inner, part, BITS, HAS_ZEROS, dtype)
            gate = tl.dot(gate_weight, x.T, gate, input_precision="ieee")
            up = tl.dot(up_weight, x.T, up, input_precision="ieee")
    is_out = outs < inner
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * 2 * inner + outs
        gate += tl.load(bias, mask=is_out, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + inner, mask=is_out, other=0.0).to(tl.float32)[:, None]
    said = activate(gate, up, alpha, limit, ACT)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    to = inner_ptr + rows.to(tl.int64)[None, :] * inner + outs[:, None]
    tl.store(to, said.to(inner_ptr.dtype.element_ty), mask=is_out[:, None])


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _codes_down_kernel(
    inner_ptr,  # [max_blocks * BLOCK_M, inner]
    codes_ptr,  # [num_experts, num_units, hidden_size, 32]
    scales_ptr,  # [num_experts, num_groups, hidden_size]; a group of MXFP4 is a unit
    zeros_ptr,  # likewise, int16
    bias_ptr,  # [num_experts, hidden_size]
    said_ptr,  # [num_pairs, hidden_size]
    pairs_ptr,
    experts_ptr,
    num_pairs,
    first,
    num_experts,
    hidden_size,
    inner,
    num_units,
    num_groups,
    group_size,
    IS_ONE_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_MXFP4: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = tl.float32 if UPCAST else inner_ptr.dtype.element_ty
    num_n = tl.cdiv(hidden_size, BLOCK_N)
    block = tl.program_id(0) // num_n
    expert, pairs = block_of(block, pairs_ptr, experts_ptr, num_pairs, first, num_experts, IS_ONE_TOKEN, BLOCK_M)
    if (expert < 0) | (expert >= num_experts):
        return
    outs = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inner_row = inner_ptr + rows.to(tl.int64)[:, None] * inner
    out = tl.minimum(outs, hidden_size - 1)
    of_unit = expert.to(tl.int64) * num_units * hidden_size + out
    of_group = expert.to(tl.int64) * num_groups * hidden_size + out
    columns = tl.arange(0, 32)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for unit in range(0, num_units):
        at = of_unit + unit * hidden_size
        codes = tl.load(codes_ptr + at[:, None] * 32 + columns)
        if IS_MXFP4:
            exponents = tl.load(scales_ptr + at)
        for part in tl.static_range(PARTS):
            k = (unit * PARTS + part) * 32
            x = load_inputs(inner_row, k, inner, EVEN_K, UPCAST, 32)
            if IS_MXFP4:
                weight = _e2m1(codes, exponents, part, dtype)
            else:
                group = of_group + tl.minimum(k // group_size, num_groups - 1) * hidden_size
                weight = _scaled(codes, scales_ptr, zeros_ptr, group, part, BITS, HAS_ZEROS, dtype)
            total = tl.dot(weight, x.T, total, input_precision="ieee")
    is_out = outs < hidden_size
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * hidden_size + outs
        total += tl.load(bias, mask=is_out, other=0.0).to(tl.float32)[:, None]
    to = said_ptr + pairs.to(tl.int64)[None, :] * hidden_size + outs[:, None]
    mask = (pairs < num_pairs)[None, :] & is_out[:, None]
    tl.store(to, total.to(said_ptr.dtype.element_ty), mask=mask)


def multiply(
    x: torch.Tensor,
    grouping: Grouping,
    between: torch.Tensor,
    said: torch.Tensor,
    *,
    stack: CodedExpertStack,
    tiles: CodeTiles,
    num_chosen: int,
) -> None:
    """Both products of a mixture.

    Args:
        x: `[num_tokens, hidden_size]`, its elements behind each other.
        between: `[max_blocks * block_m, inner]`, is written: the activated rows of the blocks.
        said: `[num_pairs, hidden_size]`, is written, but for pairs whose expert is not here.
    """
    (num_tokens, hidden_size), (num_experts, _, inner) = x.shape, stack.w2.shape
    num_pairs, is_one_token = num_tokens * num_chosen, num_tokens == 1
    kind, alpha, limit = activation(stack.act)
    tables = (grouping.pairs, grouping.experts, num_pairs, stack.first, num_experts, hidden_size, inner)
    block_n, num_warps, num_stages = tiles.up
    _codes_up_kernel[(grouping.max_blocks * triton.cdiv(inner, block_n),)](
        *(x, stack.w13.codes, stack.w13.scales, stack.w13.zeros, stack.b13, between),
        *(*tables, x.stride(0), *_divisions(stack.w13), alpha, limit),
        NUM_CHOSEN=num_chosen,
        IS_ONE_TOKEN=is_one_token,
        HAS_BIAS=stack.b13 is not None,
        ACT=kind,
        **_kind(stack.w13),
        BLOCK_M=tiles.block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    block_n, num_warps, num_stages = tiles.down
    _codes_down_kernel[(grouping.max_blocks * triton.cdiv(hidden_size, block_n),)](
        *(between, stack.w2.codes, stack.w2.scales, stack.w2.zeros, stack.b2, said),
        *(*tables, *_divisions(stack.w2)),
        IS_ONE_TOKEN=is_one_token,
        HAS_BIAS=stack.b2 is not None,
        **_kind(stack.w2),
        BLOCK_M=tiles.block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _divisions(codes: ExpertCodes) -> tuple[int, int, int]:
    """How many units there are, how many groups, and the size of one."""
    return codes.codes.shape[1], codes.scales.shape[1], codes.group_size


def _kind(codes: ExpertCodes) -> dict[str, bool | int]:
    """What tells a kernel how to read codes."""
    return {
        "HAS_ZEROS": codes.zeros is not None,
        "IS_MXFP4": codes.is_mxfp4,
        "BITS": codes.bits,
        "PARTS": PARTS[codes.bits],
        "EVEN_K": codes.in_features % (WIDTH * PARTS[codes.bits]) == 0,
        "UPCAST": UPCAST,
    }
