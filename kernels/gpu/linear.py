"""Products with floating weights: for few rows, where memory is all that counts, and with bits that no batch changes.

Few rows: each program reads whole rows of the weight once, as a stream, and multiplies them by all rows of `x`, padded
to 16, which are small enough to come from the caches. Where there are too few such programs to fill the processors,
they also divide the inputs, and a second kernel adds the parts up in their order. More rows than that are cuBLAS's.

No kernel is compiled anew for another number of rows (`do_not_specialize`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .launch import UPCAST, is_interpreted, num_processors

SKINNY_ROWS = 16

_SKINNY_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How a skinny product is divided.

    Attributes:
        block_n, block_k: outputs of a program, and inputs that it reads at a time.
        split_k: parts of the inputs.
        inputs_per_split: a multiple of `block_k`.
    """

    block_n: int
    block_k: int
    split_k: int
    inputs_per_split: int
    num_warps: int
    num_stages: int


def skinny_plan(out_features: int, in_features: int, processors: int) -> SkinnyPlan:
    """The plan for a weight, whatever the number of rows: so a row's bits are the same in any batch that is skinny.

    32 outputs a program keep some 64 KiB of weights on their way, of which two programs cover a processor's share of
    the memory's latency. The inputs are divided only where half of the processors would have nothing to do, as the
    second launch costs more than a microsecond.
    """
    block_n, block_k = 32, 256
    if is_interpreted():  # the same code in smaller pieces
        block_k = 32
    programs = triton.cdiv(out_features, block_n)
    steps = triton.cdiv(in_features, block_k)
    split_k = 1
    while programs * split_k * 2 <= processors and split_k * 2 <= steps:
        split_k *= 2
    steps_per_split = triton.cdiv(steps, split_k)
    return SkinnyPlan(
        block_n=block_n,
        block_k=block_k,
        split_k=triton.cdiv(steps, steps_per_split),
        inputs_per_split=steps_per_split * block_k,
        num_warps=4,
        num_stages=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_kernel(
    x_ptr,  # [num_rows, in_features], rows `x_stride` apart
    weight_ptr,  # [out_features, in_features], contiguous
    bias_ptr,  # [out_features]
    out_ptr,  # [num_rows, out_features]; with SPLIT [split_k, num_rows, out_features] float32
    num_rows,  # <= BLOCK_M
    out_features,
    in_features,
    x_stride,
    inputs_per_split,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # in_features is a multiple of BLOCK_K
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    begin = part * inputs_per_split
    end = tl.minimum(begin + inputs_per_split, in_features)
    # Rows and outputs that are not there are read as the last that is, and never stored: loads need no mask for them.
    x_row = x_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * x_stride
    weight_row = weight_ptr + tl.minimum(outs, out_features - 1).to(tl.int64)[:, None] * in_features
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        if EVEN_K:
            weight = tl.load(weight_row + k + ks[None, :], eviction_policy="evict_first")
            x = tl.load(x_row + k + ks[None, :])
        else:
            weight = tl.load(
                weight_row + k + ks[None, :], mask=k + ks[None, :] < end, other=0.0, eviction_policy="evict_first"
            )
            x = tl.load(x_row + k + ks[None, :], mask=k + ks[None, :] < end, other=0.0)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight.T, total, input_precision="ieee")
    is_stored = (rows < num_rows)[:, None] & (outs < out_features)[None, :]
    if SPLIT:
        rows += part * num_rows
    elif HAS_BIAS:
        # As torch's fused epilogue: added in float32, rounded once.
        total += tl.load(bias_ptr + outs, mask=outs < out_features, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * out_features + outs[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=is_stored)


@triton.jit(do_not_specialize=["size"])
def _sum_parts_kernel(
    parts_ptr,  # [SPLIT_K, size] float32
    bias_ptr,  # [out_features]
    out_ptr,  # [size], size = num_rows * out_features
    size,
    out_features,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(parts_ptr + at, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLIT_K):  # in their order: the same bits each time
        total += tl.load(parts_ptr + part * size + at, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % out_features, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, by the quickest way for the number of rows.

    Args:
        x: `[num_rows, in_features]`.
        weight: `[out_features, in_features]`, the dtype of `x`.
        bias: `[out_features]`.

    Returns:
        `[num_rows, out_features]` like `x`, summed in float32 and rounded once. Among batches of up to 16 rows each row
        has the same bits; `linear_deterministic` promises that for all.
    """
    is_skinny = (
        0 < x.shape[0] <= SKINNY_ROWS
        and x.dtype in _SKINNY_DTYPES
        and weight.dtype is x.dtype
        and weight.is_contiguous()
        and weight.shape[1] % 16 == 0
    )
    return linear_skinny(x, weight, bias) if is_skinny else F.linear(x, weight, bias)


def linear_skinny(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear`, for 1 to 16 rows, in any float dtype."""
    _check(x, weight, bias)
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    if num_rows > SKINNY_ROWS:
        raise ValueError(f"x has {num_rows} rows: at most {SKINNY_ROWS} are multiplied so")
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    plan = skinny_plan(out_features, in_features, num_processors(x.device))
    is_split = plan.split_k > 1
    to = out
    if is_split:
        to = torch.empty((plan.split_k, num_rows, out_features), dtype=torch.float32, device=x.device)
    _skinny_kernel[triton.cdiv(out_features, plan.block_n), plan.split_k](
        *(x, weight, bias, to, num_rows, out_features, in_features, x.stride(0), plan.inputs_per_split),
        HAS_BIAS=bias is not None,
        SPLIT=is_split,
        EVEN_K=in_features % plan.block_k == 0,
        UPCAST=UPCAST,
        BLOCK_M=SKINNY_ROWS,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    if is_split:
        size, block = num_rows * out_features, 256
        _sum_parts_kernel[(triton.cdiv(size, block),)](
            *(to, bias, out, size, out_features), HAS_BIAS=bias is not None, SPLIT_K=plan.split_k, BLOCK=block
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _deterministic_kernel(
    x_ptr,  # [num_rows, in_features], rows `x_stride` apart
    weight_ptr,  # [out_features, in_features], contiguous
    bias_ptr,  # [out_features]
    out_ptr,  # [num_rows, out_features]
    num_rows,
    out_features,
    in_features,
    x_stride,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP blocks of rows take turns within a column of weights, which stays in the L2 cache for them.
    program = tl.program_id(0)
    num_m, num_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = program // (GROUP * num_n)
    of_group = tl.minimum(num_m - group * GROUP, GROUP)
    within = program % (GROUP * num_n)
    rows = (group * GROUP + within % of_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = (within // of_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_row = x_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * x_stride
    weight_row = weight_ptr + tl.minimum(outs, out_features - 1).to(tl.int64)[:, None] * in_features
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        x = tl.load(x_row + k + ks[None, :], mask=k + ks[None, :] < in_features, other=0.0)
        weight = tl.load(weight_row + k + ks[None, :], mask=k + ks[None, :] < in_features, other=0.0)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight.T, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + outs, mask=outs < out_features, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * out_features + outs[None, :]
    is_stored = (rows < num_rows)[:, None] & (outs < out_features)[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=is_stored)


def linear_deterministic(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, by the same tiles in the same order for any number of rows.

    Args:
        x: `[num_rows, in_features]`, any float dtype.
        weight: `[out_features, in_features]`, contiguous, the dtype of `x`.
        bias: `[out_features]`.

    Returns:
        `[num_rows, out_features]` like `x`, summed in float32 and rounded once; each row's bits are its own.
    """
    _check(x, weight, bias)
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    block_m, block_n = 64, 64
    block_k = 32 if x.dtype is torch.float32 else 64
    _deterministic_kernel[(triton.cdiv(num_rows, block_m) * triton.cdiv(out_features, block_n),)](
        *(x, weight, bias, out, num_rows, out_features, in_features, x.stride(0)),
        HAS_BIAS=bias is not None,
        UPCAST=UPCAST,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=8,
        num_warps=4,
        num_stages=4,
    )
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if (
        x.dim() != 2
        or weight.dim() != 2
        or weight.shape[1] != x.shape[1]
        or weight.dtype is not x.dtype
        or not weight.is_contiguous()
    ):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and the weight {weight.dtype} {list(weight.shape)}, strides "
            f"{weight.stride()}: they must be of one dtype and fit each other, and the weight contiguous"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"the bias is {list(bias.shape)} for {weight.shape[0]} outputs")
