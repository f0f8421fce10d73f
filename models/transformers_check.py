"""Whether a model of `transformers` computes the same with its KV in our pages as by itself; asked at load."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..kernels.attention_batch import AttentionBatch
from .interface import CausalLM, KVCache, KVCacheSpec

_LENGTHS = (9, 5)  # tokens of the check's rows
_BLOCK_SIZE = 4


def check_tokens(device: torch.device, length: int = max(_LENGTHS)) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of one of the check's rows; small ids, which every vocabulary has."""
    positions = torch.arange(length, device=device)
    return positions * 7 % 31 + 1, positions


def own_hidden(decoder: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """The hidden states of the check's rows by the model's own attention, one pass for each row and no cache."""
    return [decoder(input_ids=check_tokens(device, length)[0][None], use_cache=False)[0][0] for length in _LENGTHS]


def largest_error(paged: CausalLM, expected: list[torch.Tensor]) -> float:
    """How far hidden states with the paged cache are from `expected`, relative to their norm.

    Two rows go through in three ragged steps: two prefill chunks that end within a block, one decode beside a chunk,
    two decodes of different length. In float32 the worst token counts; else the median of the worst step, because in a
    mixture of experts rounding to 8 or 11 bits may send a single token to another expert.
    """
    long_row, _ = _LENGTHS
    blocks_per_row = -(-long_row // _BLOCK_SIZE)
    tables = torch.arange(2 * blocks_per_row, dtype=torch.int32).flip(0).view(2, blocks_per_row)
    kv_caches = [_empty_cache(spec, 2 * blocks_per_row, paged) for spec in paged.kv_cache_specs]
    token_ids, _ = check_tokens(paged.device)
    worst = 0.0
    for short_span, long_span in (((0, 3), (0, 5)), ((3, 4), (5, 8)), ((4, 5), (8, 9))):
        spans = (short_span, long_span)
        num_new = [end - start for start, end in spans]
        positions = [torch.arange(start, end) for start, end in spans]
        slots = [
            tables[row, row_positions // _BLOCK_SIZE] * _BLOCK_SIZE + row_positions % _BLOCK_SIZE
            for row, row_positions in enumerate(positions)
        ]
        batch = AttentionBatch(
            query_start=torch.tensor([0, num_new[0], sum(num_new)], dtype=torch.int32, device=paged.device),
            context_lens=torch.tensor([end for _, end in spans], dtype=torch.int32, device=paged.device),
            block_tables=tables.to(paged.device),
            slot_mapping=torch.cat(slots).long().to(paged.device),
            block_size=_BLOCK_SIZE,
            max_query_len=max(num_new),
            max_context_len=max(end for _, end in spans),
            num_decodes=num_new.count(1),
        )
        step_positions = torch.cat(positions).to(paged.device)
        hidden = paged.forward(token_ids[step_positions], step_positions, batch, kv_caches).float()
        own = torch.cat([expected[1][slice(*short_span)], expected[0][slice(*long_span)]]).float()
        errors = (hidden - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-6)
        error = float(errors.max() if paged.dtype == torch.float32 else errors.median())
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def _empty_cache(spec: KVCacheSpec, num_blocks: int, paged: CausalLM) -> KVCache:
    shape = (num_blocks, spec.num_kv_heads, _BLOCK_SIZE)
    return KVCache(
        k=torch.zeros(*shape, spec.k_head_dim, dtype=paged.dtype, device=paged.device),
        v=torch.zeros(*shape, spec.v_head_dim, dtype=paged.dtype, device=paged.device),
    )
