"""Linear layers whose weights have 4 or 8 bits, with a scale for each group of inputs, on a GPU.

For up to 64 rows the codes themselves, which are whole numbers that 16-bit floats hold exactly, are multiplied on the
tensor cores, and each group's sum by its scale afterwards, in float32: nothing is rounded before the end, and a group
costs one multiplication an output instead of one a weight. For more rows, where arithmetic counts and not memory, the
weights are widened once and multiplied as floating ones.

Codes of 4 bits lie as `pack_nibbles` leaves them on a GPU: 64 inputs are 16 words of 16 bits, and bits `4 s` of word
`l` are input `16 s + l`. So the four quarters of a word are four tiles, each of inputs `l` at a distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..code_layout import unpack_nibbles
from ..quantized_weight import QuantizedWeight
from .launch import is_interpreted, num_processors
from .linear import _sum_parts_kernel, linear_deterministic

MOST_ROWS = 64  # that codes are multiplied for

_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class QuantizedPlan:
    """How a product with codes is divided.

    Attributes:
        block_k: inputs at a time: one group, or part of one; 64 where a group of 4-bit codes is 32 wide.
        has_halves: the two halves of `block_k` are of groups of their own.
        split_k, inputs_per_split: as in `linear.SkinnyPlan`; codes are so small that a processor needs two programs.
    """

    block_m: int
    block_n: int
    block_k: int
    has_halves: bool
    split_k: int
    inputs_per_split: int
    num_stages: int


def quantized_plan(num_rows: int, weight: QuantizedWeight, processors: int) -> QuantizedPlan:
    """The plan for a weight and up to 16, 32 or 64 rows."""
    out_features, in_features = weight.shape
    one_group = weight.scales.shape[1] == 1
    group_size = 128 if one_group else weight.group_size  # all inputs share a scale: cut them as it suits
    has_halves = weight.bits == 4 and group_size % 64 != 0
    if weight.bits == 4:
        block_k = 128 if group_size % 128 == 0 else 64
    else:
        block_k = next(size for size in (128, 64, 32, 16) if group_size % size == 0)
    block_m, block_n = max(16, triton.next_power_of_2(num_rows)), 64
    if is_interpreted():
        block_n = 32
    programs, steps = triton.cdiv(out_features, block_n), triton.cdiv(in_features, block_k)
    split_k = 1
    while programs * split_k <= processors and split_k * 2 <= steps:
        split_k *= 2
    steps_per_split = triton.cdiv(steps, split_k)
    return QuantizedPlan(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        has_halves=has_halves,
        split_k=triton.cdiv(steps, steps_per_split),
        inputs_per_split=steps_per_split * block_k,
        num_stages=num_stages(block_m, weight.bits),
    )


def num_stages(block_m: int, bits: int) -> int:
    """Tiles under way: codes are small, and it takes some 25 KiB of them a program to cover the memory's latency."""
    return {16: 8, 32: 6, 64: 4}[block_m] if bits == 4 else {16: 5, 32: 5, 64: 4}[block_m]


@triton.jit
def _as_floats(words, shift: tl.constexpr, zero, dtype: tl.constexpr):
    """4 bits of each word, less `zero`, as floats: exact, as all are whole numbers below 32."""
    if dtype == tl.bfloat16:  # 128 + code, its bits put into the mantissa of 128: quicker than a conversion
        code = (((words >> shift) & 15) | 0x4300).to(tl.bfloat16, bitcast=True)
        return code - (zero + 128).to(tl.bfloat16)
    elif dtype == tl.float16:
        code = (((words >> shift) & 15) | 0x6400).to(tl.float16, bitcast=True)
        return code - (zero + 1024).to(tl.float16)
    else:
        return ((words >> shift) & 15).to(dtype) - zero.to(dtype)


@triton.jit
def _zeros_of(zeros_ptr, at, mask, HAS_ZEROS: tl.constexpr, HAS_OFFSETS: tl.constexpr, BITS: tl.constexpr):
    """What is subtracted from a group's codes, int32, in the shape of `at`."""
    if HAS_ZEROS:
        return tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.int32)
    elif HAS_OFFSETS or BITS == 8:
        return tl.zeros_like(at).to(tl.int32)
    else:
        return tl.zeros_like(at).to(tl.int32) + 8


@triton.jit
def _quarter(x_row, words, zero, k, in_features, SHIFT: tl.constexpr, WORDS: tl.constexpr, dtype: tl.constexpr):
    """One quarter of the inputs of a step: its product `[BLOCK_M, BLOCK_N]` and the sum of its inputs `[BLOCK_M]`."""
    words_at = tl.arange(0, WORDS)
    inputs = k + words_at // 16 * 64 + SHIFT * 4 + words_at % 16  # 4 s bits up are 16 s inputs on
    x = tl.load(x_row + inputs[None, :], mask=(inputs < in_features)[None, :], other=0.0)
    codes = _as_floats(words, SHIFT, zero[:, None], dtype)
    return tl.dot(x.to(dtype), codes.T, input_precision="ieee"), tl.sum(x.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def _codes_kernel(
    x_ptr,  # [num_rows, in_features], rows `x_stride` apart
    codes_ptr,  # [out_features, code_stride]: int16 words of four codes, or int8 codes
    scales_ptr,  # [out_features, num_groups]
    zeros_ptr,  # [out_features, num_groups] int16
    offsets_ptr,  # [out_features, num_groups]
    out_ptr,  # [num_rows, out_features]; with SPLIT [split_k, num_rows, out_features] float32
    num_rows,
    out_features,
    in_features,
    x_stride,
    code_stride,
    num_groups,
    group_size,
    inputs_per_split,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_HALVES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = BLOCK_K // 4
    part = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_out = outs < out_features
    begin = part * inputs_per_split
    end = tl.minimum(begin + inputs_per_split, in_features)
    x_row = x_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * x_stride
    here = tl.minimum(outs, out_features - 1).to(tl.int64)
    code_row = codes_ptr + here[:, None] * code_stride
    factors = here * num_groups
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        at = factors + k // group_size
        scale = tl.load(scales_ptr + at, mask=is_out, other=0.0).to(tl.float32)
        zero = _zeros_of(zeros_ptr, at, is_out, HAS_ZEROS, HAS_OFFSETS, BITS)
        if BITS == 4:
            # Rows end with a whole 64 inputs, and the last may be the end of memory.
            at_words = k // 4 + tl.arange(0, WORDS)
            words = tl.load(code_row + at_words[None, :], mask=(at_words < code_stride)[None, :], other=0)
            product, inputs = _quarter(x_row, words, zero, k, in_features, 0, WORDS, dtype)
            second, of_second = _quarter(x_row, words, zero, k, in_features, 4, WORDS, dtype)
            product += second
            inputs += of_second
            later = zero
            if HAS_HALVES:
                after = factors + tl.minimum((k + 32) // group_size, num_groups - 1)
                later = _zeros_of(zeros_ptr, after, is_out, HAS_ZEROS, HAS_OFFSETS, BITS)
            other, of_other = _quarter(x_row, words, later, k, in_features, 8, WORDS, dtype)
            last, of_last = _quarter(x_row, words, later, k, in_features, 12, WORDS, dtype)
            other += last
            of_other += of_last
            if HAS_HALVES:
                total += other * tl.load(scales_ptr + after, mask=is_out, other=0.0).to(tl.float32)[None, :]
                if HAS_OFFSETS:
                    offset = tl.load(offsets_ptr + after, mask=is_out, other=0.0).to(tl.float32)
                    total += of_other[:, None] * offset[None, :]
            else:
                product += other
                inputs += of_other
        else:
            ks = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_row + ks[None, :], mask=(ks < in_features)[None, :], other=0.0)
            codes = tl.load(code_row + ks[None, :], mask=(ks < code_stride)[None, :], other=0).to(dtype)
            codes -= zero[:, None].to(dtype)
            product = tl.dot(x, codes.T, input_precision="ieee")
            inputs = tl.sum(x.to(tl.float32), axis=1)
        total += product * scale[None, :]
        if HAS_OFFSETS:
            total += inputs[:, None] * tl.load(offsets_ptr + at, mask=is_out, other=0.0).to(tl.float32)[None, :]
    is_stored = (rows < num_rows)[:, None] & is_out[None, :]
    if SPLIT:
        rows += part * num_rows
    to = out_ptr + rows.to(tl.int64)[:, None] * out_features + outs[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=is_stored)


@triton.jit
def _widen_kernel(
    codes_ptr,  # [out_features, code_stride]: int16 words of four codes, or int8 codes
    scales_ptr,  # [out_features, num_groups]
    zeros_ptr,  # [out_features, num_groups] int16
    offsets_ptr,  # [out_features, num_groups]
    weight_ptr,  # [out_features, in_features]
    out_features,
    in_features,
    code_stride,
    num_groups,
    group_size,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * 64
    PER_CODE: tl.constexpr = 4 if BITS == 4 else 1
    WIDTH: tl.constexpr = 64 // PER_CODE
    here = outs.to(tl.int64)[:, None]
    columns = tl.arange(0, WIDTH)
    is_out = (outs < out_features)[:, None]
    stored = tl.load(codes_ptr + here * code_stride + k // PER_CODE + columns[None, :], mask=is_out, other=0)
    for quarter in tl.static_range(PER_CODE):
        inputs = (k + quarter * 16 + columns)[None, :]
        mask = is_out & (inputs < in_features)
        at = here * num_groups + tl.minimum(inputs // group_size, num_groups - 1)
        code = ((stored >> (4 * quarter)) & 15) if BITS == 4 else stored
        code = code.to(tl.int32) - _zeros_of(zeros_ptr, at, mask, HAS_ZEROS, HAS_OFFSETS, BITS)
        weight = code.to(tl.float32) * tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_OFFSETS:
            weight += tl.load(offsets_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(weight_ptr + here * in_features + inputs, weight.to(weight_ptr.dtype.element_ty), mask=mask)


def widen(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weights it stands for, `[out_features, in_features]`, in the order of its codes, rounded to `dtype` once."""
    out_features, in_features = weight.shape
    codes = _stored(weight)
    wide = torch.empty((out_features, in_features), dtype=dtype, device=codes.device)
    block_n = 32
    _widen_kernel[triton.cdiv(out_features, block_n), triton.cdiv(in_features, 64)](
        *(codes, weight.scales, weight.zeros, weight.offsets, wide, out_features, in_features, codes.stride(0)),
        *(weight.scales.shape[1], weight.group_size),
        BITS=weight.bits,
        HAS_ZEROS=weight.zeros is not None,
        HAS_OFFSETS=weight.offsets is not None,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return wide


def linear_codes(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """`x @ weight.T` for 1 to 64 rows of inputs in the order of the codes, from the codes themselves."""
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    codes, plan = _stored(weight), quantized_plan(num_rows, weight, num_processors(x.device))
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    is_split = plan.split_k > 1
    to = out
    if is_split:
        to = torch.empty((plan.split_k, num_rows, out_features), dtype=torch.float32, device=x.device)
    _codes_kernel[triton.cdiv(out_features, plan.block_n), plan.split_k](
        *(x, codes, weight.scales, weight.zeros, weight.offsets, to, num_rows, out_features, in_features),
        *(x.stride(0), codes.stride(0), weight.scales.shape[1], weight.group_size, plan.inputs_per_split),
        BITS=weight.bits,
        HAS_ZEROS=weight.zeros is not None,
        HAS_OFFSETS=weight.offsets is not None,
        HAS_HALVES=plan.has_halves,
        SPLIT=is_split,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        num_warps=4,
        num_stages=plan.num_stages,
    )
    if is_split:
        size, block = num_rows * out_features, 256
        _sum_parts_kernel[(triton.cdiv(size, block),)](
            *(to, None, out, size, out_features), HAS_BIAS=False, SPLIT_K=plan.split_k, BLOCK=block
        )
    return out


def linear_quantized(x: torch.Tensor, weight: QuantizedWeight, *, quick: bool = False) -> torch.Tensor:
    """`x @ weight.T`, see `kernels.linear_quantized.linear_quantized`.

    With `quick` a row's bits may depend on how many there are, by up to 16, 32, 64 and more; else they are its own, at
    the price of widening the weights each time.
    """
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x is {list(x.shape)} and the weight takes [num_tokens, {weight.in_features}]")
    if weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    if x.stride(1) != 1:
        x = x.contiguous()
    num_rows = x.shape[0]
    if quick and 0 < num_rows <= MOST_ROWS and x.dtype in _DTYPES:
        return linear_codes(x, weight)
    wide = widen(weight, x.dtype)
    return F.linear(x, wide) if quick else linear_deterministic(x, wide)


def _stored(weight: QuantizedWeight) -> torch.Tensor:
    if weight.bits == 8:
        return weight.codes.view(torch.int8)
    if weight.device.type != "cpu":
        return weight.codes.view(torch.int16)
    codes = unpack_nibbles(weight.codes, weight.shape[0])  # in the interpreter, which has no other device
    quarters = codes.view(weight.shape[0], -1, 4, 16).to(torch.int32) << (4 * torch.arange(4)).unsqueeze(-1)
    return quarters.sum(-2).to(torch.uint16).view(torch.int16).view(weight.shape[0], -1)
