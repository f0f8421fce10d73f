"""Writing new keys and values to their slots of a paged cache, quantised where it is; see `write_kv` one level up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kv_quantization import head_dim_of, is_quantized

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 below 2^22 to the nearest even integer
_SMALLEST_SCALE = tl.constexpr(2.0**-100)  # as in kv_quantization


@triton.jit
def _write_rows(
    x_ptr, cache_ptr, scale_ptr, token, slot, stride_token, stride_head,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUANTIZED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    WIDTH: tl.constexpr = DIM + 4 * QUANTIZED
    head = tl.arange(0, HEAD_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    real = (head < HEADS)[:, None] & (dim < DIM)[None, :]
    x = tl.load(x_ptr + token * stride_token + head[:, None] * stride_head + dim[None, :], mask=real, other=0.0)
    row = (slot // BLOCK_SIZE * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    pointers = cache_ptr + row[:, None] * WIDTH + dim[None, :]
    if QUANTIZED:
        x = x.to(tl.float32)
        bad = tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), 1) > 0
        x = tl.where(bad[:, None], 0.0, x)
        largest = tl.max(tl.abs(x), 1)
        scale = tl.maximum(tl.div_rn(largest, tl.zeros_like(largest) + LARGEST), _SMALLEST_SCALE)
        codes = tl.div_rn(x, tl.zeros_like(x) + scale[:, None])
        if LARGEST == 127.0:
            codes = (codes + _ROUND) - _ROUND
        tl.store(pointers, codes.to(cache_ptr.dtype.element_ty), mask=real)
        scale = tl.where(bad, float("nan"), scale)
        tl.store(scale_ptr + (row * WIDTH + DIM) // 4, scale, mask=head < HEADS)
    else:
        tl.store(pointers, x.to(cache_ptr.dtype.element_ty), mask=real)


@triton.jit
def write_kv_kernel(
    k_ptr,  # [num_tokens, HEADS, K_DIM], as is v_ptr with V_DIM
    v_ptr,
    k_cache_ptr,  # [num_blocks, HEADS, BLOCK_SIZE, K_DIM (+ 4)], as is v_cache_ptr
    v_cache_ptr,
    k_scale_ptr,  # the caches as float32
    v_scale_ptr,
    slots_ptr,  # [num_tokens] int64
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One program a token; a slot of -1 is padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    _write_rows(
        k_ptr, k_cache_ptr, k_scale_ptr, token, slot, k_stride_token, k_stride_head,
        HEADS, HEAD_BLOCK, BLOCK_SIZE, K_DIM, K_BLOCK, QUANTIZED, LARGEST,
    )  # fmt: skip
    _write_rows(
        v_ptr, v_cache_ptr, v_scale_ptr, token, slot, v_stride_token, v_stride_head,
        HEADS, HEAD_BLOCK, BLOCK_SIZE, V_DIM, V_BLOCK, QUANTIZED, LARGEST,
    )  # fmt: skip


def scale_view(cache: torch.Tensor) -> torch.Tensor:
    """A quantised cache's memory as float32, among which are its scales; any other cache as it is.

    Raises:
        ValueError: a head's width is not a multiple of 4, so that scales are not aligned.
    """
    if not is_quantized(cache.dtype):
        return cache
    if cache.shape[-1] % 4:
        raise ValueError(
            f"a quantised KV cache on a GPU needs a head_dim that is a multiple of 4, got {head_dim_of(cache)}: "
            "keep this model's cache in its own dtype"
        )
    return cache.view(torch.uint8).view(torch.float32)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write the new tokens' keys and values to their slots, in place; arguments as one level up.

    Slots are not checked: one outside the cache would be an error of the KV allocator.

    Raises:
        ValueError: a quantised cache whose head_dim is not a multiple of 4.
    """
    if k.shape[0] == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    _, heads, block_size, _ = k_cache.shape
    quantized = is_quantized(k_cache.dtype)
    write_kv_kernel[(k.shape[0],)](
        *(k, v, k_cache, v_cache, scale_view(k_cache), scale_view(v_cache), slot_mapping),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        HEADS=heads,
        HEAD_BLOCK=triton.next_power_of_2(heads),
        BLOCK_SIZE=block_size,
        K_DIM=k.shape[2],
        K_BLOCK=triton.next_power_of_2(k.shape[2]),
        V_DIM=v.shape[2],
        V_BLOCK=triton.next_power_of_2(v.shape[2]),
        QUANTIZED=quantized,
        LARGEST=127.0 if k_cache.dtype is torch.int8 else 448.0,
    )
