"""Paged attention against its meaning in float64: masks, head sizes, block sizes, quantised caches, bits of a row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..attention_batch import AttentionBatch
from ..attention_kind import AttentionKind
from ..kv_quantization import dequantize, quantize_ref, row_width
from ..paged_attention import paged_attention_ref
from . import paged_attention as gpu_attention
from .check_setting import Found, Random, Setting, differs, error_of


@dataclass(frozen=True, slots=True)
class Attention:
    """`(new, context)` tokens of each row, and what kind of attention."""

    rows: tuple[tuple[int, int], ...]
    heads: int = 8
    kv_heads: int = 2
    width: int = 128
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        kinds = [word for word in ("sinks", "alibi", "fp8") if getattr(self, word)]
        kinds += [f"window {self.window}"] if self.window else []
        kinds += [f"cap {self.softcap:g}"] if self.softcap else []
        rows = f"{len(self.rows)} rows to {max(context for _, context in self.rows)}"
        return " ".join([rows, f"{self.heads}/{self.kv_heads}x{self.width} page {self.block_size}", *kinds])


_DECODE = ((1, 1), (1, 17), (1, 1000), (1, 4095), (1, 333))
_MIXED = ((1, 70), (5, 5), (130, 400), (1, 1), (64, 64), (3, 2000))
_SMALL_DECODE = ((1, 1), (1, 17), (1, 40))
_SMALL_MIXED = ((1, 20), (5, 5), (7, 30))

CASES = (
    Attention(_DECODE),
    Attention(_MIXED),
    Attention(((2048, 2048),), heads=32, kv_heads=8),
    Attention(((1, 30000),), heads=32, kv_heads=8),
    Attention(tuple((1, 900 + 7 * row) for row in range(200)), heads=16, kv_heads=8),
    Attention(_MIXED, width=64, block_size=32),
    Attention(_MIXED, width=80),
    Attention(_MIXED, width=256, block_size=64),
    Attention(_MIXED, window=100),
    Attention(_MIXED, softcap=30.0),
    Attention(_MIXED, sinks=True, width=64, window=128),
    Attention(_MIXED, alibi=True),
    Attention(_MIXED, fp8=True),
    Attention(_DECODE, fp8=True, block_size=128),
    Attention(_MIXED, heads=4, kv_heads=4, block_size=256),
)
SMALL_CASES = (
    Attention(_SMALL_DECODE, heads=4, width=16),
    Attention(_SMALL_MIXED, heads=4, width=16, window=9, sinks=True),
)


def _attention_inputs(
    case: Attention, s: Setting
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch, AttentionKind]:
    random = Random(s)
    blocks = [-(-context // case.block_size) for _, context in case.rows]
    order = torch.randperm(sum(blocks) + 1, device=s.device, generator=random.generator).to(torch.int32)
    table = torch.full((len(blocks), max(blocks)), 2**30, dtype=torch.int32, device=s.device)  # read, it would crash
    start = 0
    for row, count in enumerate(blocks):
        table[row, :count] = order[start : start + count]
        start += count
    new = [count for count, _ in case.rows]
    query_start = torch.tensor([0, *new], device=s.device).cumsum(0).to(torch.int32)
    batch = AttentionBatch(
        query_start=query_start,
        context_lens=torch.tensor([context for _, context in case.rows], dtype=torch.int32, device=s.device),
        block_tables=table,
        slot_mapping=torch.full((sum(new),), -1, dtype=torch.int64, device=s.device),
        block_size=case.block_size,
        max_query_len=max(new),
        max_context_len=max(context for _, context in case.rows),
        num_decodes=len(new) if max(new) == 1 else 0,
    )
    shape = (sum(blocks) + 1, case.kv_heads, case.block_size, case.width)
    caches = [random.randn(*shape) for _ in range(2)]
    if case.fp8:
        kv_dtype = torch.float8_e4m3fn
        caches = [quantize_ref(cache, kv_dtype) for cache in caches]
        assert caches[0].shape[-1] == row_width(case.width, kv_dtype)
    kind = AttentionKind(
        scale=case.width**-0.5,
        sliding_window=case.window,
        softcap=case.softcap,
        sinks=random.randn(case.heads).float() if case.sinks else None,
        alibi_slopes=(0.5 ** torch.arange(1, case.heads + 1, device=s.device)).float() if case.alibi else None,
    )
    return random.randn(sum(new), case.heads, case.width), caches[0], caches[1], batch, kind


def check_attention(s: Setting) -> Found:
    for case in SMALL_CASES if s.small else CASES:
        q, k, v, batch, kind = _attention_inputs(case, s)
        k_wide, v_wide = (dequantize(cache) if case.fp8 else cache for cache in (k, v))
        exact = q
        if s.computes:
            exact = paged_attention_ref(q.double(), k_wide.double(), v_wide.double(), _clipped(batch), kind)
        out = torch.full_like(q, float("nan"))
        gpu_attention.paged_attention(q, k, v, batch, kind, out=out)
        yield case.name, error_of(out, exact), s.bound
        same = gpu_attention.paged_attention(q, k, v, batch, kind, batch_invariant=True)
        yield f"{case.name}, invariant", error_of(same, exact), s.bound
        if not case.fp8 and len(case.rows) > 1:
            yield f"{case.name}, a row alone", _alone_differs(case.rows[-1], q, k, v, batch, kind, same), 0.5
    num_before = 3 if s.small else 2**31 // (2 * 16 * 128)  # blocks of 2 heads: what 32 bits do not reach lies behind
    case = SMALL_CASES[1] if s.small else CASES[1]
    yield f"{case.name}, {num_before} blocks further on", _further_on_differs(case, s, num_before), 0.5
    if not s.small:  # the same twice: a race would show
        q, k, v, batch, kind = _attention_inputs(CASES[4], s)
        outs = [gpu_attention.paged_attention(q, k, v, batch, kind) for _ in range(20)]
        yield "the same twenty times", max(differs(outs[0], out) for out in outs), 0.5


def _further_on_differs(case: Attention, s: Setting, num_before: int) -> float:
    """Whether a row's bits depend on where in the cache its blocks lie."""
    q, k, v, batch, kind = _attention_inputs(case, s)
    here = gpu_attention.paged_attention(q, k, v, batch, kind)
    caches = [
        torch.empty((num_before + len(cache), *cache.shape[1:]), dtype=s.dtype, device=s.device) for cache in (k, v)
    ]
    for far, cache in zip(caches, (k, v), strict=True):
        far[num_before:] = cache
    tables = batch.block_tables
    moved = replace(batch, block_tables=torch.where(tables == 2**30, tables, tables + num_before))
    return differs(here, gpu_attention.paged_attention(q, caches[0], caches[1], moved, kind))


def _clipped(batch: AttentionBatch) -> AttentionBatch:
    """The batch with block tables that a reference may index."""
    return AttentionBatch(
        query_start=batch.query_start,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables.clamp(max=0).where(batch.block_tables == 2**30, batch.block_tables),
        slot_mapping=batch.slot_mapping,
        block_size=batch.block_size,
        max_query_len=batch.max_query_len,
        max_context_len=batch.max_context_len,
        num_decodes=batch.num_decodes,
    )


def _alone_differs(  # noqa: PLR0917,RUF100 - the call's arguments, and two more
    row: tuple[int, int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: AttentionBatch,
    kind: AttentionKind,
    together: torch.Tensor,
) -> float:
    """Whether the last row's bits depend on its neighbours, in the variant that promises that they do not."""
    (num_new, context), end = row, len(q)
    begin = end - num_new
    alone = AttentionBatch(
        query_start=torch.tensor([0, num_new], dtype=torch.int32, device=q.device),
        context_lens=batch.context_lens[-1:],
        block_tables=batch.block_tables[-1:, : -(-context // batch.block_size)].contiguous(),
        slot_mapping=batch.slot_mapping[begin:end],
        block_size=batch.block_size,
        max_query_len=num_new,
        max_context_len=context,
        num_decodes=int(num_new == 1),
    )
    out = gpu_attention.paged_attention(q[begin:end], k, v, alone, kind, batch_invariant=True)
    return differs(out, together[begin:end])
