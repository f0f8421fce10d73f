"""Rows of a quantised KV cache: the codes of one head of one token, then their scale, in one run of bytes.

A cache in a quantised dtype is `[num_blocks, num_kv_heads, block_size, head_dim + 4]` of one-byte elements, the last
four of each row the bits of its float32 scale: so keys and scales are read together, and no code that carries a cache
about has to know. One scale a head and token costs 3 % of the memory at head_dim 128; a coarser one would have to be
known before the tokens are, or be corrected for those that are there.
"""

from __future__ import annotations

import torch

SCALE_BYTES = 4
# As in csrc/vector.h.
CODES = {torch.int8: 3, torch.float8_e4m3fn: 4}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SMALLEST_SCALE = 2.0**-100


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether a cache of this dtype holds codes with scales."""
    return dtype in CODES


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` that one head of one token takes, its scale included."""
    return head_dim + SCALE_BYTES if is_quantized(dtype) else head_dim


def head_dim_of(cache: torch.Tensor) -> int:
    """The width of a head whose rows lie in `cache`, whatever its dtype."""
    return cache.shape[-1] - SCALE_BYTES if is_quantized(cache.dtype) else cache.shape[-1]


def quantize_ref(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a quantised cache for `x`, `[..., head_dim]`: what the C kernels write, bit for bit.

    The scale takes a row's largest magnitude to 127 (int8) or 448 (fp8 e4m3); codes are rounded to nearest, ties to
    even. So a number is off by at most half a scale (int8), or by 1/16 of itself or 2^-10 of a scale (fp8), whichever
    is more. A row with a number that is not finite gets NaN for its scale.

    Returns:
        `[..., head_dim + 4]` of `dtype`.
    """
    y = x.float()
    scale = y.abs().amax(-1, keepdim=True) / _LARGEST[dtype]
    bad = ~torch.isfinite(scale)
    scale = torch.where(bad, torch.nan, scale.clamp_min(_SMALLEST_SCALE))
    scaled = torch.where(bad, 0.0, y / scale)
    codes = scaled.round().to(torch.int8) if dtype is torch.int8 else scaled.to(dtype)
    rows = torch.cat((codes.view(torch.uint8), scale.contiguous().view(torch.uint8)), dim=-1)
    return rows.view(dtype)


def dequantize(rows: torch.Tensor) -> torch.Tensor:
    """The numbers of rows `[..., head_dim + 4]` that `quantize_ref` or a C kernel made, `[..., head_dim]` float32."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous().view(torch.uint8)
    return codes.float() * scale.view(torch.float32)
