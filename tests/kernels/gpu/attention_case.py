"""Ragged batches over a paged cache, for tests of attention."""

from __future__ import annotations

import dataclasses

import torch

from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.attention_kind import AttentionKind
from octavo.kernels.kv_quantization import row_width
from octavo.kernels.paged_attention import paged_attention_ref, write_kv_ref

Row = tuple[int, int]  # (new tokens, context length)


@dataclasses.dataclass
class Case:
    """Queries, caches and batch; `num_true_tokens` are of rows, those behind are padding."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    batch: AttentionBatch
    num_true_tokens: int

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    def reference(self, **options: object) -> torch.Tensor:
        return paged_attention_ref(self.q, self.k_cache, self.v_cache, self.batch, AttentionKind(self.scale, **options))


def make_case(
    rows: list[Row],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    k_dim: int = 16,
    v_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    seeds: list[int] | None = None,
    layout_seed: int = 0,
    padded_rows: int = 0,
    padded_tokens: int = 0,
) -> Case:
    """A row's numbers depend on its seed alone, wherever its blocks lie. Slots that no row owns hold NaN."""
    v_dim = v_dim or k_dim
    cache_dtype = cache_dtype or dtype
    counts = [-(-context // block_size) for _, context in rows]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(layout_seed)).int()
    tables = torch.zeros(len(rows) + padded_rows, max(counts), dtype=torch.int32)
    caches = []
    for dim in (k_dim, v_dim):
        shape = (sum(counts) + 3, num_kv_heads, block_size, row_width(dim, cache_dtype))
        # All ones are NaN in any float, and in a quantised row's scale.
        caches.append(torch.full(shape, -1, dtype=torch.int8).view(cache_dtype) if cache_dtype.itemsize == 1 else
                      torch.full(shape, torch.nan, dtype=cache_dtype))  # fmt: skip
    queries, slots, used = [], [], 0
    for row, (num_new, context) in enumerate(rows):
        tables[row, : counts[row]] = order[used : used + counts[row]]
        used += counts[row]
        generator = torch.Generator().manual_seed(1000 + (seeds[row] if seeds else row))
        k = torch.randn(context, num_kv_heads, k_dim, generator=generator).to(dtype)
        v = torch.randn(context, num_kv_heads, v_dim, generator=generator).to(dtype)
        positions = torch.arange(context)
        row_slots = tables[row, positions // block_size].long() * block_size + positions % block_size
        write_kv_ref(k, v, *caches, row_slots)
        queries.append((2 * torch.randn(context, num_heads, k_dim, generator=generator).to(dtype))[context - num_new :])
        slots.append(row_slots[context - num_new :])
    queries.append(torch.ones(padded_tokens, num_heads, k_dim, dtype=dtype))
    slots.append(torch.full((padded_tokens,), -1))
    num_new = torch.tensor([0, *(new for new, _ in rows), *[0] * padded_rows])
    decodes = [new == 1 for new, _ in rows]
    batch = AttentionBatch(
        query_start=num_new.cumsum(0).int(),
        context_lens=torch.tensor([*(context for _, context in rows), *[0] * padded_rows], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        block_size=block_size,
        max_query_len=max(new for new, _ in rows),
        max_context_len=max(context for _, context in rows),
        num_decodes=decodes.index(False) if False in decodes else len(rows),
    )
    return Case(torch.cat(queries), caches[0], caches[1], batch, int(num_new.sum()))
