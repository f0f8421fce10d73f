"""Rotary embedding on a GPU, with the norm of queries and keys before it and the KV write after it, in one launch.

One program takes a few heads of one token: of the queries, or of the keys with their values. What a head becomes
depends on it alone, so a token's bits do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kv_quantization import CODES, head_dim_of
from .kv_rows import largest_of_rows, row_scales, store_columns, store_rows, store_scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS_OF_PROGRAM = 1024
_MAX_HEAD_DIM = 1024


@triton.jit
def _angles(table, column, is_column, ROTARY_DIM: tl.constexpr):
    """Cosines and sines of a position, `[1, HALF]` each.

    There is no one to raise an error to: a position outside the table takes its nearest row.
    """
    cos_sin_ptr, position, max_position = table
    position = tl.minimum(tl.maximum(position, 0), max_position - 1)
    angles = cos_sin_ptr + position * ROTARY_DIM + column
    cos = tl.load(angles, mask=is_column, other=0.0)
    sin = tl.load(angles + ROTARY_DIM // 2, mask=is_column, other=0.0)
    return cos[None, :], sin[None, :]


@triton.jit
def _columns_of(HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    """Columns of the first half of what turns and of what does not turn, each with which of them there are."""
    column = tl.arange(0, HALF)
    is_column = column < ROTARY_DIM // 2
    rest_column, is_rest = column, is_column  # of nothing, if REST is 0
    if REST > 0:
        rest_column = ROTARY_DIM + tl.arange(0, REST)
        is_rest = rest_column < HEAD_DIM
    return column, is_column, rest_column, is_rest


@triton.jit
def _load_parts(rows, columns, is_head, ROTARY_DIM: tl.constexpr, REST: tl.constexpr):
    """Heads in three parts, float32: both halves of what turns, `[HEADS, HALF]`, and the rest, `[HEADS, REST]`.

    Args:
        rows: `[HEADS, 1]`, pointers at each head's first element.
        columns: of `_columns_of`.
        is_head: `[HEADS]`, which of them there are.
    """
    column, is_column, rest_column, is_rest = columns
    mask = is_head[:, None] & is_column[None, :]
    x1 = tl.load(rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(rows + ROTARY_DIM // 2 + column[None, :], mask=mask, other=0.0).to(tl.float32)
    x3 = x2  # of nothing, if REST is 0
    if REST > 0:
        x3 = tl.load(rows + rest_column[None, :], mask=is_head[:, None] & is_rest[None, :], other=0.0).to(tl.float32)
    return x1, x2, x3


@triton.jit
def _normed(parts, columns, weight_ptr, eps, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, REST: tl.constexpr):
    """The RMS norm of heads; without a weight as they are."""
    x1, x2, x3 = parts
    column, is_column, rest_column, is_rest = columns
    if weight_ptr is not None:
        weight1 = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        weight2 = tl.load(weight_ptr + ROTARY_DIM // 2 + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        if REST > 0:
            squares += tl.sum(x3 * x3, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        x1 = x1 * scale * weight1
        x2 = x2 * scale * weight2
        if REST > 0:
            weight3 = tl.load(weight_ptr + rest_column, mask=is_rest, other=0.0)
            x3 = x3 * scale * weight3.to(tl.float32)[None, :]
    return x1, x2, x3


@triton.jit
def _turn_heads(
    rows, columns, is_head, table, weight_ptr, eps,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Norm and turn heads in place.

    Args:
        rows, columns, is_head: as for `_load_parts`.
        table: of cosines and sines: its pointer, the position, how many there are.
        weight_ptr: of the norm; None: no norm.

    Returns:
        The heads' parts as they are stored.
    """
    column, is_column, rest_column, is_rest = columns
    parts = _load_parts(rows, columns, is_head, ROTARY_DIM, REST)
    cos, sin = _angles(table, column, is_column, ROTARY_DIM)
    x1, x2, x3 = _normed(parts, columns, weight_ptr, eps, HEAD_DIM, ROTARY_DIM, REST)
    dtype = rows.dtype.element_ty
    y1 = (x1 * cos - x2 * sin).to(dtype)
    y2 = (x2 * cos + x1 * sin).to(dtype)
    y3 = x3.to(dtype)
    # Of fewer numbers than threads, several threads hold the same one: all have loaded it before one stores to it.
    tl.debug_barrier()
    mask = is_head[:, None] & is_column[None, :]
    tl.store(rows + column[None, :], y1, mask=mask)
    tl.store(rows + ROTARY_DIM // 2 + column[None, :], y2, mask=mask)
    if REST > 0:
        tl.store(rows + rest_column[None, :], y3, mask=is_head[:, None] & is_rest[None, :])
    return y1, y2, y3


@triton.jit
def _cache_rows(slot, head, num_kv_heads, block_size):
    """Row numbers of the cache for one slot of each head: a block's heads, and in each of them its tokens."""
    block_id = slot // block_size
    return (block_id * num_kv_heads + head) * block_size + (slot - block_id * block_size)


@triton.jit
def _store_keys(
    cache_ptr, cache_rows, parts, columns, is_head,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, REST: tl.constexpr, FP8: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Rows of the key cache, from their parts as the tensor got them.

    What the cache gets is what the tensor got, so a key is rounded twice as if it had been read back.
    """
    y1, y2, y3 = parts
    column, is_column, rest_column, is_rest = columns
    k1, k2 = y1.to(tl.float32), y2.to(tl.float32)
    WIDTH: tl.constexpr = HEAD_DIM + (4 if QUANTIZED else 0)
    row_ptrs = cache_ptr + cache_rows[:, None] * WIDTH
    row_mask = is_head[:, None]
    scale = tl.full((y1.shape[0],), 1.0, tl.float32)
    if QUANTIZED:
        largest = tl.maximum(largest_of_rows(k1), largest_of_rows(k2))
        if REST > 0:
            largest = tl.maximum(largest, largest_of_rows(y3.to(tl.float32)))
        scale = row_scales(largest, FP8)
        store_scales(row_ptrs, HEAD_DIM, scale, row_mask)
    scale = scale[:, None]
    mask = row_mask & is_column[None, :]
    store_columns(row_ptrs, column[None, :], k1, mask, scale, FP8, QUANTIZED)
    store_columns(row_ptrs, ROTARY_DIM // 2 + column[None, :], k2, mask, scale, FP8, QUANTIZED)
    if REST > 0:
        rest_mask = row_mask & is_rest[None, :]
        store_columns(row_ptrs, rest_column[None, :], y3.to(tl.float32), rest_mask, scale, FP8, QUANTIZED)


@triton.jit
def _rotary_kernel(
    q_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    k_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM]
    v_ptr,  # [num_tokens, num_kv_heads, V_HEAD_DIM]
    cos_sin_ptr,  # [max_position, ROTARY_DIM] float32, contiguous
    positions_ptr,  # [num_tokens]
    slots_ptr,  # [num_tokens], as positions_ptr int64; None: no cache
    k_cache_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM (+ 4 bytes)], contiguous; bytes if quantised
    v_cache_ptr,  # likewise, V_HEAD_DIM
    q_weight_ptr,  # [HEAD_DIM] or None
    k_weight_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    num_heads,
    num_kv_heads,
    max_position,
    block_size,
    num_slots,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,  # of one program, a power of two
    HALF: tl.constexpr,  # power of two, >= ROTARY_DIM / 2
    REST: tl.constexpr,  # power of two, >= HEAD_DIM - ROTARY_DIM; 0: nothing is left unrotated
    V_BLOCK: tl.constexpr,  # power of two, >= V_HEAD_DIM
    FP8: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_query_parts = tl.cdiv(num_heads, HEADS)
    columns = _columns_of(HEAD_DIM, ROTARY_DIM, HALF, REST)
    table = (cos_sin_ptr, tl.load(positions_ptr + token), max_position)
    if part < num_query_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        rows = q_ptr + token * q_stride_token + head[:, None] * q_stride_head
        _turn_heads(rows, columns, head < num_heads, table, q_weight_ptr, eps, HEAD_DIM, ROTARY_DIM, REST)
    else:
        head = (part - num_query_parts) * HEADS + tl.arange(0, HEADS)
        is_head = head < num_kv_heads
        rows = k_ptr + token * k_stride_token + head[:, None] * k_stride_head
        if slots_ptr is not None:  # before the keys are turned, so that all loads are in flight together
            slot = tl.load(slots_ptr + token)
            v_column = tl.arange(0, V_BLOCK)[None, :]
            v_mask = is_head[:, None] & (v_column < V_HEAD_DIM)
            v_rows = v_ptr + token * v_stride_token + head[:, None] * v_stride_head
            v = tl.load(v_rows + v_column, mask=v_mask, other=0.0).to(tl.float32)
        keys = _turn_heads(rows, columns, is_head, table, k_weight_ptr, eps, HEAD_DIM, ROTARY_DIM, REST)
        if slots_ptr is not None:
            if (slot >= 0) & (slot < num_slots):
                cache_rows = _cache_rows(slot, head, num_kv_heads, block_size)
                _store_keys(
                    *(k_cache_ptr, cache_rows, keys, columns, is_head, HEAD_DIM, ROTARY_DIM, REST, FP8, QUANTIZED)
                )
                store_rows(
                    *(v_cache_ptr, cache_rows, v_column, v, v_mask, is_head[:, None], V_HEAD_DIM, FP8, QUANTIZED)
                )


def can(  # noqa: PLR0917,RUF100 - inputs, table, cache: as in write_kv
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
) -> bool:
    """Whether the kernel is written for such tensors.

    Raises:
        ValueError: a cache without the other, or without slots.
    """
    caches = (k_cache, v_cache, slot_mapping)
    if any(x is None for x in caches) and any(x is not None for x in caches):
        raise ValueError("k_cache, v_cache and slot_mapping belong together: give all of them or none")
    if q.dtype not in DTYPES or k.dtype is not q.dtype or v.dtype is not q.dtype or q.shape[2] > _MAX_HEAD_DIM:
        return False
    if q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        return False
    if cos_sin.dtype is not torch.float32 or not cos_sin.is_contiguous() or not positions.is_contiguous():
        return False
    if k_cache is not None and v_cache is not None and slot_mapping is not None:
        if k_cache.dtype is not v_cache.dtype or (k_cache.dtype not in CODES and k_cache.dtype not in DTYPES):
            return False
        if not (k_cache.is_contiguous() and v_cache.is_contiguous() and slot_mapping.is_contiguous()):
            return False
    return all(w is None or (w.is_contiguous() and w.dtype in DTYPES) for w in (q_weight, k_weight))


def rotary_and_write(  # noqa: PLR0917,RUF100 - inputs, table, cache: as in write_kv
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """See `kernels.rotary.rotary_and_write`; here a slot outside the cache is skipped, as -1 is, and a position outside
    the table takes its nearest row: an error could only be raised by waiting for the device."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = k.shape[1], v.shape[2]
    rotary_dim = cos_sin.shape[1]
    is_quantized = k_cache is not None and k_cache.dtype in CODES
    block_size, num_slots = 1, 0
    if k_cache is not None and v_cache is not None:
        block_size, num_slots = k_cache.shape[2], k_cache.shape[0] * k_cache.shape[2]
        if head_dim_of(k_cache) != head_dim or head_dim_of(v_cache) != v_head_dim:
            raise ValueError(
                f"the caches' rows are {k_cache.shape[3]} and {v_cache.shape[3]} wide: not made for {head_dim=} "
                f"and {v_head_dim=}"
            )
        if k_cache.shape[1] != num_kv_heads:
            raise ValueError(f"the cache has {k_cache.shape[1]} heads, k has {num_kv_heads}")
    if num_tokens == 0:
        return
    widest = triton.next_power_of_2(max(head_dim, v_head_dim))
    heads = min(max(1, _ELEMENTS_OF_PROGRAM // widest), triton.next_power_of_2(max(num_heads, num_kv_heads)))
    grid = (num_tokens, triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, heads))
    rest = head_dim - rotary_dim
    _rotary_kernel[grid](
        *(q, k, v, cos_sin, positions, slot_mapping),
        *((x.view(torch.uint8) if x is not None and is_quantized else x) for x in (k_cache, v_cache)),
        *(q_weight, k_weight),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(num_heads, num_kv_heads, cos_sin.shape[0], block_size, num_slots, eps),
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        V_HEAD_DIM=v_head_dim,
        HEADS=heads,
        HALF=triton.next_power_of_2(max(1, rotary_dim // 2)),
        REST=triton.next_power_of_2(rest) if rest else 0,
        V_BLOCK=triton.next_power_of_2(v_head_dim),
        FP8=is_quantized and k_cache is not None and k_cache.dtype is torch.float8_e4m3fn,
        QUANTIZED=is_quantized,
        num_warps=4,
    )
