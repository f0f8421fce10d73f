"""Writing new keys and values to their slots of a paged cache, quantised where it is; see `write_kv` one level up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kv_quantization import is_quantized
from .kv_rows import store_rows


@triton.jit
def _write_heads(
    x_ptr, cache_ptr, token, slot, stride_token, stride_head,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, FP8: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    head = tl.arange(0, HEAD_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    is_head = (head < HEADS)[:, None]
    mask = is_head & (dim < DIM)
    x = tl.load(x_ptr + token * stride_token + head[:, None] * stride_head + dim, mask=mask, other=0.0)
    rows = (slot // BLOCK_SIZE * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    store_rows(cache_ptr, rows, dim, x.to(tl.float32), mask, is_head, DIM, FP8, QUANTIZED)


@triton.jit
def write_kv_kernel(
    k_ptr,  # [num_tokens, HEADS, K_DIM], as is v_ptr with V_DIM
    v_ptr,
    k_cache_ptr,  # [num_blocks, HEADS, BLOCK_SIZE, K_DIM (+ 4 bytes)], as is v_cache_ptr; bytes if quantised
    v_cache_ptr,
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
    FP8: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """One program a token; a slot of -1 is padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    _write_heads(
        k_ptr, k_cache_ptr, token, slot, k_stride_token, k_stride_head,
        HEADS, HEAD_BLOCK, BLOCK_SIZE, K_DIM, K_BLOCK, FP8, QUANTIZED,
    )  # fmt: skip
    _write_heads(
        v_ptr, v_cache_ptr, token, slot, v_stride_token, v_stride_head,
        HEADS, HEAD_BLOCK, BLOCK_SIZE, V_DIM, V_BLOCK, FP8, QUANTIZED,
    )  # fmt: skip


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write the new tokens' keys and values to their slots, in place; arguments as one level up.

    Slots are not checked: one outside the cache would be an error of the KV allocator.
    """
    if k.shape[0] == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    _, heads, block_size, _ = k_cache.shape
    quantized = is_quantized(k_cache.dtype)
    write_kv_kernel[(k.shape[0],)](
        *(k, v, *((cache.view(torch.uint8) if quantized else cache) for cache in (k_cache, v_cache)), slot_mapping),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        HEADS=heads,
        HEAD_BLOCK=triton.next_power_of_2(heads),
        BLOCK_SIZE=block_size,
        K_DIM=k.shape[2],
        K_BLOCK=triton.next_power_of_2(k.shape[2]),
        V_DIM=v.shape[2],
        V_BLOCK=triton.next_power_of_2(v.shape[2]),
        FP8=k_cache.dtype is torch.float8_e4m3fn,
        QUANTIZED=quantized,
    )
