"""Rows of a KV cache in Triton, quantised where it is: what `kernels.kv_quantization.quantize_ref` says, bit for bit.

A quantised cache is seen as bytes: a row's codes, then the four of its scale.

In integers and IEEE float32, not by casts to float8: those are not bit-equal to torch's in Triton's interpreter, and a
GPU's saturate where torch's do not.
"""

from __future__ import annotations

import triton
import triton.language as tl

_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds |x| < 2**22 to an integer, ties to even


@triton.jit
def fp8_e4m3_codes(x):
    """Float32 of magnitude at most 448, rounded to nearest even, as the bits of float8 e4m3 (uint8)."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal: round to 3 bits of mantissa, then move the exponent's bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below 2**-6 the step is 2**-9; eight steps are the code of the smallest normal number.
    steps = (tl.abs(x) * 512.0 + _HALF_EVEN) - _HALF_EVEN
    subnormal = steps.to(tl.int32).to(tl.uint32)
    codes = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2**-6
    return (codes | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def int8_codes(x):
    """Float32 of magnitude at most 127, rounded to nearest even, as the bits of int8 (uint8)."""
    return ((x + _HALF_EVEN) - _HALF_EVEN).to(tl.int32).to(tl.uint8)


@triton.jit
def row_scales(largest, FP8: tl.constexpr):
    """What to divide rows by whose largest magnitudes are `largest`; NaN where that is not finite."""
    if FP8:
        scale = tl.div_rn(largest, 448.0)
    else:
        scale = tl.div_rn(largest, 127.0)
    scale = tl.maximum(scale, 7.888609052210118e-31)  # 2**-100
    return tl.where(largest < float("inf"), scale, float("nan"))  # a NaN is not less either


@triton.jit
def row_codes(x, scale, FP8: tl.constexpr):
    """The codes of `x` under its rows' `scale`; zeros where that is NaN."""
    scaled = tl.where(scale == scale, tl.div_rn(x, scale), 0.0)
    if FP8:
        codes = fp8_e4m3_codes(scaled)
    else:
        codes = int8_codes(scaled)
    return codes


@triton.jit
def largest_of_rows(x):
    """The largest magnitude of each row; infinite where the row has NaN."""
    magnitude = tl.abs(x)
    # A maximum may pass over NaN: where one is, take infinity, which is not finite either.
    return tl.max(tl.where(magnitude == magnitude, magnitude, float("inf")), axis=1)


@triton.jit
def store_columns(row_ptrs, columns, x, mask, scale, FP8: tl.constexpr, QUANTIZED: tl.constexpr):
    """Some columns of cache rows, quantised or rounded to the cache's dtype."""
    if QUANTIZED:
        tl.store(row_ptrs + columns, row_codes(x, scale, FP8), mask=mask)
    else:
        tl.store(row_ptrs + columns, x.to(row_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def store_scales(row_ptrs, head_dim: tl.constexpr, scale, mask):
    """The four bytes of each row's scale, behind its codes; one by one, as a row need not be aligned."""
    index = tl.arange(0, 4)[None, :]
    bits = scale.to(tl.uint32, bitcast=True)[:, None]
    tl.store(row_ptrs + head_dim + index, ((bits >> (index * 8)) & 0xFF).to(tl.uint8), mask=mask)


@triton.jit
def store_rows(
    cache_ptr, cache_rows, columns, x, mask, row_mask,
    DIM: tl.constexpr, FP8: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Whole rows of a cache.

    Args:
        cache_rows: `[rows]`, their numbers in the cache.
        columns: `[1, width]`; `x`, `[rows, width]` float32, is 0 behind the first `DIM`.
        mask, row_mask: `[rows, width]` and `[rows, 1]`, what is to be written.
    """
    WIDTH: tl.constexpr = DIM + (4 if QUANTIZED else 0)
    row_ptrs = cache_ptr + cache_rows[:, None] * WIDTH
    scale = tl.full((x.shape[0],), 1.0, tl.float32)
    if QUANTIZED:
        scale = row_scales(largest_of_rows(x), FP8)
        store_scales(row_ptrs, DIM, scale, row_mask)
    store_columns(row_ptrs, columns, x, mask, scale[:, None], FP8, QUANTIZED)
