"""Attention over a paged KV cache: its meaning, its torch path, and the launcher of its C kernel.

Tensors on a CUDA device go to the Triton kernels of `gpu/paged_attention.py`.

The cache of one layer is head-major, `[num_blocks, num_kv_heads, block_size, head_dim]`, so that the tokens of one head
within a block are contiguous. In int8 and fp8 (e4m3) a head's row is four bytes longer, for its scale: see
`kv_quantization`. Source: PagedAttention (Kwon et al., SOSP 2023), section 4.
"""

from __future__ import annotations

import ctypes

import torch

from . import cpu_build
from .attention_batch import AttentionBatch
from .attention_kind import AttentionKind
from .cpu_build import CODE, POINTER, SIZE
from .kv_quantization import CODES, dequantize, head_dim_of, is_quantized, quantize_ref

_NEGATIVE_INFINITY = float("-inf")
CACHE_CODES = {**cpu_build.DTYPE_CODES, **CODES}
"""What the C kernels call the dtypes of a cache."""


def write_kv_ref(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """What `write_kv` means."""
    block_size = k_cache.shape[2]
    keep = slot_mapping >= 0
    if not bool(keep.all()):
        k, v, slot_mapping = k[keep], v[keep], slot_mapping[keep]
    block_ids = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offsets = slot_mapping - block_ids * block_size
    # Indices around a slice put the indexed axis first: [num_tokens, num_kv_heads, head_dim].
    for x, cache in ((k, k_cache), (v, v_cache)):
        if is_quantized(cache.dtype):  # indexed as plain bytes: torch has no assignment by index for float8
            cache.view(torch.uint8)[block_ids, :, offsets] = quantize_ref(x, cache.dtype).view(torch.uint8)
        else:
            cache[block_ids, :, offsets] = x.to(cache.dtype)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write the new tokens' keys and values to their slots, in place.

    Args:
        k, v: `[num_tokens, num_kv_heads, k_head_dim]` and `[num_tokens, num_kv_heads, v_head_dim]`, any strides.
        k_cache, v_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, each with its own head_dim, contiguous, of
            any dtype: what is written is rounded to it, or quantised.
        slot_mapping: `[num_tokens]` int64; a token whose slot is -1 is padding and is skipped.

    Raises:
        IndexError: on a CPU, a slot outside the cache.
    """
    if k_cache.device.type == "cuda":
        from .gpu.paged_attention import write_kv as write_kv_on_gpu  # triton need not be there without a GPU

        write_kv_on_gpu(k, v, k_cache, v_cache, slot_mapping)
        return
    can = _c_reads(k, v) and k_cache.dtype is v_cache.dtype and k_cache.dtype in CACHE_CODES
    kernels = _kernels() if can else None
    if kernels is None or slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
        write_kv_ref(k, v, k_cache, v_cache, slot_mapping)
        return
    slots = slot_mapping.data_ptr()
    for x, cache in ((k, k_cache), (v, v_cache)):
        num_blocks, num_kv_heads, block_size, _ = cache.shape
        stride_token, stride_head, stride_dim = x.stride()
        if stride_dim != 1:
            x = x.contiguous()  # noqa: PLW2901 - the same tensor, laid out anew
            stride_token, stride_head, _ = x.stride()
        refused = kernels.octavo_write_kv(
            *(x.data_ptr(), cache.data_ptr(), slots),
            *(x.shape[0], num_kv_heads, num_blocks, block_size, head_dim_of(cache), stride_token, stride_head),
            *(cpu_build.DTYPE_CODES[x.dtype], CACHE_CODES[cache.dtype]),
        )
        if refused:
            raise IndexError(f"a slot of slot_mapping is outside the cache's {num_blocks * block_size} slots")


def _c_reads(*tensors: torch.Tensor) -> bool:
    first = tensors[0].dtype
    return first in cpu_build.DTYPE_CODES and all(x.dtype is first and x.device.type == "cpu" for x in tensors)


def gather_kv(cache: torch.Tensor, block_table: torch.Tensor, context_len: int) -> torch.Tensor:
    """The first `context_len` tokens of one row, `[num_kv_heads, context_len, head_dim]`, a copy; never quantised."""
    _, num_kv_heads, block_size, width = cache.shape
    num_blocks = -(-context_len // block_size)
    plain = cache.view(torch.uint8) if is_quantized(cache.dtype) else cache
    blocks = plain.index_select(0, block_table[:num_blocks].long())
    rows = blocks.transpose(0, 1).reshape(num_kv_heads, num_blocks * block_size, width)[:, :context_len]
    return dequantize(rows.view(cache.dtype)) if is_quantized(cache.dtype) else rows


def _attend_row(
    q: torch.Tensor,  # [num_new, num_heads, k_head_dim]
    k: torch.Tensor,  # [num_kv_heads, context_len, k_head_dim]
    v: torch.Tensor,  # [num_kv_heads, context_len, v_head_dim]
    kind: AttentionKind,
) -> torch.Tensor:
    """One row's attention in the dtype of `q`; `[num_new, num_heads, v_head_dim]`."""
    num_new, num_heads, _ = q.shape
    num_kv_heads, context_len, _ = k.shape
    group = num_heads // num_kv_heads
    queries = q.transpose(0, 1).reshape(num_kv_heads, group * num_new, -1)
    logits = torch.matmul(queries, k.transpose(1, 2)).mul_(kind.scale).view(num_kv_heads, group, num_new, context_len)
    if kind.softcap > 0:
        logits = torch.tanh(logits / kind.softcap) * kind.softcap
    key_positions = torch.arange(context_len, device=q.device)
    query_positions = torch.arange(context_len - num_new, context_len, device=q.device)
    distance = key_positions[None, :] - query_positions[:, None]  # [num_new, context_len], <= 0 where visible
    if kind.alibi_slopes is not None:
        logits = logits + kind.alibi_slopes.to(q.dtype).view(num_kv_heads, group, 1, 1) * distance
    hidden = distance > 0
    if kind.sliding_window > 0:
        hidden = hidden | (distance <= -kind.sliding_window)
    logits = logits.masked_fill(hidden, _NEGATIVE_INFINITY)
    if kind.sinks is not None:
        sink = kind.sinks.to(q.dtype).view(num_kv_heads, group, 1, 1).expand(-1, -1, num_new, 1)
        weights = torch.softmax(torch.cat((logits, sink), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(logits, dim=-1)
    out = torch.matmul(weights.reshape(num_kv_heads, group * num_new, context_len), v)
    return out.view(num_heads, num_new, -1).transpose(0, 1)


def paged_attention_ref(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch, kind: AttentionKind
) -> torch.Tensor:
    """What `paged_attention` means, row by row, in float32 (float64 for float64 queries)."""
    num_tokens, num_heads, _ = q.shape
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(num_tokens, num_heads, head_dim_of(v_cache))
    query_start = batch.query_start.tolist()
    for row, context_len in enumerate(batch.context_lens.tolist()):
        start, end = query_start[row], query_start[row + 1]
        if start == end:
            continue
        out[start:end] = _attend_row(
            q[start:end].to(compute),
            gather_kv(k_cache, batch.block_tables[row], context_len).to(compute),
            gather_kv(v_cache, batch.block_tables[row], context_len).to(compute),
            kind,
        ).to(q.dtype)
    return out


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    kind: AttentionKind,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Causal attention of each new token over its row's cached tokens, itself included.

    The new tokens' keys and values must be in the cache already (`write_kv`). Query heads are grouped: head h reads KV
    head `h // (num_heads // num_kv_heads)`.

    Args:
        q: `[num_tokens, num_heads, k_head_dim]`.
        k_cache, v_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, each with its own head_dim, of one dtype.
        batch: which tokens belong to which row, and where each row's blocks are.
        kind: which keys a query sees, and how it weighs them.
        batch_invariant: on a GPU, promise of a query's bits what the C kernel always does, at some cost of speed.

    Returns:
        `[num_tokens, num_heads, v_head_dim]`, dtype of `q`. Tokens of no row, or of one without context, are padding:
        zeros.

        The C kernel's bits for a query depend on that query, its visible keys and values and their positions only: they
        are the same alone or in any batch, decoded or prefilled in any chunks, for any block size, block table and
        number of threads. The torch path promises that of no two different shapes.

    Raises:
        MemoryError: no memory for the kernel's scratch.
        ValueError: on a GPU, shapes or dtypes that its kernels cannot take.
    """
    if q.device.type == "cuda":
        from .gpu.paged_attention import paged_attention as paged_attention_on_gpu  # triton need not be there without

        return paged_attention_on_gpu(q, k_cache, v_cache, batch, kind, batch_invariant=batch_invariant)
    kernels = None
    if _c_reads(q) and k_cache.dtype is v_cache.dtype and k_cache.dtype in CACHE_CODES:
        kernels = _kernels()
    if kernels is None or not k_cache.is_contiguous() or not v_cache.is_contiguous():
        return paged_attention_ref(q, k_cache, v_cache, batch, kind)
    return _attention_in_c(kernels, q, k_cache, v_cache, batch, kind)


def _check_what_c_takes_for_granted(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch
) -> None:
    """The kernel reads raw memory: what `AttentionBatch` promises is checked before."""
    for indices in (batch.query_start, batch.context_lens, batch.block_tables):
        assert indices.dtype is torch.int32
        assert indices.stride(-1) == 1 or indices.shape[-1] <= 1
    assert batch.block_size == v_cache.shape[2]
    assert q.shape[1] % v_cache.shape[1] == 0
    assert k_cache.shape[:3] == v_cache.shape[:3]
    assert head_dim_of(k_cache) == q.shape[2]


def _attention_in_c(  # noqa: PLR0917 - the library, and the arguments of `paged_attention`
    kernels: ctypes.CDLL,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    kind: AttentionKind,
) -> torch.Tensor:
    """As `paged_attention`, for caches that the C kernel reads as they lie."""
    _check_what_c_takes_for_granted(q, k_cache, v_cache, batch)
    if q.stride(2) != 1:
        q = q.contiguous()
    # Tensors made here must outlive the call: only their addresses are passed on.
    sinks = None if kind.sinks is None else kind.sinks.to(torch.float32).contiguous()
    alibi_slopes = None if kind.alibi_slopes is None else kind.alibi_slopes.to(torch.float32).contiguous()
    num_tokens, num_heads, k_head_dim = q.shape
    v_head_dim = head_dim_of(v_cache)
    out = torch.empty((num_tokens, num_heads, v_head_dim), dtype=q.dtype)
    args = _AttentionArgs(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        batch.query_start.data_ptr(),
        batch.context_lens.data_ptr(),
        batch.block_tables.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        None if alibi_slopes is None else alibi_slopes.data_ptr(),
        q.stride(0),
        q.stride(1),
        batch.block_tables.stride(0),
        batch.num_rows,
        num_tokens,
        num_heads,
        v_cache.shape[1],
        k_head_dim,
        v_head_dim,
        batch.block_size,
        kind.sliding_window,
        torch.get_num_threads(),
        kind.scale,
        kind.softcap,
        cpu_build.DTYPE_CODES[q.dtype],
        CACHE_CODES[k_cache.dtype],
    )
    if kernels.octavo_paged_attention(args) != 0:
        raise MemoryError("paged_attention could not allocate its scratch memory")
    return out


class _AttentionArgs(ctypes.Structure):
    """`attention_args` of csrc/operations.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("alibi_slopes", ctypes.c_void_p),
        ("q_stride_token", ctypes.c_int64),
        ("q_stride_head", ctypes.c_int64),
        ("block_table_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("k_dim", ctypes.c_int64),
        ("v_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("q_dtype", ctypes.c_int32),
        ("cache_dtype", ctypes.c_int32),
    )


_kernels = cpu_build.declared(
    octavo_paged_attention=(CODE, ctypes.POINTER(_AttentionArgs)),
    octavo_write_kv=(CODE, POINTER, POINTER, POINTER, *(SIZE,) * 7, CODE, CODE),
)
