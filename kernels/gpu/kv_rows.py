"""Rows of a quantised KV cache in Triton: what `kernels.kv_quantization.quantize_ref` says, bit for bit.

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
