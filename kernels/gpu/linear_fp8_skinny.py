"""Products of a few rows with weights of 8-bit floats (e4m3), on a GPU: bound by memory, 8 bits a weight.

In registers they are widened to the 16 bits of the inputs, which hold them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..fp8_weight import Fp8Weight
from .launch import UPCAST, is_interpreted, num_processors
from .linear import _sum_parts_kernel
from .round_inputs import GROUP

MOST_ROWS = 64  # that are few


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How a product of few rows is divided; as `linear.SkinnyPlan`, of a group of inputs at a time."""

    block_m: int
    block_n: int
    split_k: int
    inputs_per_split: int
    num_stages: int


def skinny_plan(num_rows: int, out_features: int, in_features: int, processors: int) -> SkinnyPlan:
    """The plan for up to 16, 32 or 64 rows: tiles and stages are those of codes of 8 bits in `linear_quantized`."""
    block_m, block_n = max(16, triton.next_power_of_2(num_rows)), 64
    if is_interpreted():
        block_n = 32
    programs, steps = triton.cdiv(out_features, block_n), triton.cdiv(in_features, GROUP)
    split_k = 1
    while programs * split_k <= processors and split_k * 2 <= steps:
        split_k *= 2
    steps_per_split = triton.cdiv(steps, split_k)
    return SkinnyPlan(
        block_m=block_m,
        block_n=block_n,
        split_k=triton.cdiv(steps, steps_per_split),
        inputs_per_split=steps_per_split * GROUP,
        num_stages=num_stages(block_m),
    )


def num_stages(block_m: int) -> int:
    """Tiles of a skinny product under way."""
    return {16: 5, 32: 5, 64: 4}[block_m]


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_skinny_kernel(
    x_ptr,  # [num_rows, in_features], rows `x_stride` apart
    weight_ptr,  # [out_features, in_features] e4m3
    scales_ptr,  # [ceil(out_features / rows_per_scale), num_groups]
    out_ptr,  # [num_rows, out_features]; with SPLIT [split_k, num_rows, out_features] float32
    num_rows,  # <= BLOCK_M
    out_features,
    in_features,
    x_stride,
    num_groups,
    rows_per_scale,
    inputs_per_split,
    BY_GROUP: tl.constexpr,  # each BLOCK_K inputs have scales of their own
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # in_features is a multiple of BLOCK_K
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    part = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    begin = part * inputs_per_split
    end = tl.minimum(begin + inputs_per_split, in_features)
    x_row = x_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * x_stride
    here = tl.minimum(outs, out_features - 1).to(tl.int64)
    weight_row = weight_ptr + here[:, None] * in_features
    scale_at = scales_ptr + (here // rows_per_scale) * num_groups
    scale = tl.load(scale_at + (begin // BLOCK_K if BY_GROUP else 0))
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        at = k + ks[None, :]
        if EVEN_K:
            weight = tl.load(weight_row + at, eviction_policy="evict_first")
            x = tl.load(x_row + at)
        else:
            weight = tl.load(weight_row + at, mask=at < in_features, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_row + at, mask=at < in_features, other=0.0)
        weight = weight.to(dtype)
        if BY_GROUP:
            next_scale = tl.load(scale_at + tl.minimum(k // BLOCK_K + 1, num_groups - 1))
            total += tl.dot(x.to(dtype), weight.T, input_precision="ieee") * scale[None, :]
            scale = next_scale
        else:
            total = tl.dot(x.to(dtype), weight.T, total, input_precision="ieee")
    if not BY_GROUP:
        total *= scale[None, :]
    is_stored = (rows < num_rows)[:, None] & (outs < out_features)[None, :]
    if SPLIT:
        rows += part * num_rows
    to = out_ptr + rows.to(tl.int64)[:, None] * out_features + outs[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=is_stored)


def linear_fp8_skinny(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """`x @ weight.T` for 1 to 64 rows, of inputs as they are."""
    if x.stride(1) != 1:
        x = x.contiguous()
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    plan = skinny_plan(num_rows, out_features, in_features, num_processors(x.device))
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    is_split = plan.split_k > 1
    to = out
    if is_split:
        to = torch.empty((plan.split_k, num_rows, out_features), dtype=torch.float32, device=x.device)
    _fp8_skinny_kernel[triton.cdiv(out_features, plan.block_n), plan.split_k](
        *(x, weight.codes, weight.scales, to, num_rows, out_features, in_features, x.stride(0)),
        *(weight.scales.shape[1], weight.rows_per_scale, plan.inputs_per_split),
        BY_GROUP=weight.scales.shape[1] > 1,
        SPLIT=is_split,
        EVEN_K=in_features % GROUP == 0,
        UPCAST=UPCAST,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=GROUP,
        num_warps=4,
        num_stages=plan.num_stages,
    )
    if is_split:
        size, block = num_rows * out_features, 256
        _sum_parts_kernel[(triton.cdiv(size, block),)](
            *(to, None, out, size, out_features), HAS_BIAS=False, SPLIT_K=plan.split_k, BLOCK=block
        )
    return out
