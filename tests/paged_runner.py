"""Runs a `CausalLM` the way the executor does, through paged steps, one row or several, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo.kernels.attention_batch import AttentionBatch
from octavo.models.interface import CausalLM, KVCache


def make_kv_caches(model: CausalLM, num_blocks: int, block_size: int) -> list[KVCache]:
    """Caches full of NaN, so that reading a slot never written shows."""
    return [
        KVCache(
            k=torch.full(
                (num_blocks, spec.num_kv_heads, block_size, spec.k_head_dim),
                float("nan"),
                dtype=model.dtype,
                device=model.device,
            ),
            v=torch.full(
                (num_blocks, spec.num_kv_heads, block_size, spec.v_head_dim),
                float("nan"),
                dtype=model.dtype,
                device=model.device,
            ),
        )
        for spec in model.kv_cache_specs
    ]


def make_batch(rows: Sequence[tuple[int, int, list[int]]], block_size: int) -> tuple[torch.Tensor, AttentionBatch]:
    """Positions and `AttentionBatch` of rows `(num_computed_tokens, num_new_tokens, block_ids)`, decodes first."""
    query_start, context_lens, slots, positions = [0], [], [], []
    for num_computed, num_new, block_ids in rows:
        query_start.append(query_start[-1] + num_new)
        context_lens.append(num_computed + num_new)
        for position in range(num_computed, num_computed + num_new):
            positions.append(position)
            slots.append(block_ids[position // block_size] * block_size + position % block_size)
    widest = max(len(block_ids) for _, _, block_ids in rows)
    num_decodes = 0
    while num_decodes < len(rows) and rows[num_decodes][1] == 1:
        num_decodes += 1
    assert all(num_new > 1 for _, num_new, _ in rows[num_decodes:]), "rows with one new token come first"
    tables = [block_ids + [0] * (widest - len(block_ids)) for _, _, block_ids in rows]
    batch = AttentionBatch(
        query_start=torch.tensor(query_start, dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        block_size=block_size,
        max_query_len=max(num_new for _, num_new, _ in rows),
        max_context_len=max(context_lens),
        num_decodes=num_decodes,
    )
    return torch.tensor(positions, dtype=torch.int64), batch


class PagedRunner:
    """Several rows in one model, each with its own scattered blocks.

    Args:
        num_rows, max_len: the cache holds `num_rows` rows of `max_len` tokens.
        seed: order in which block ids are handed out, so that no row's blocks are neighbours by accident.
    """

    def __init__(
        self, model: CausalLM, num_rows: int = 1, max_len: int = 256, block_size: int = 16, seed: int = 0
    ) -> None:
        self.model = model
        self.block_size = block_size
        blocks_per_row = -(-max_len // block_size)
        num_blocks = num_rows * blocks_per_row + 1
        order = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
        self._blocks = [order[row::num_rows][:blocks_per_row] for row in range(num_rows)]
        self._lengths = [0] * num_rows
        self.kv_caches = make_kv_caches(model, num_blocks, block_size)

    def step(self, new_tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Feed each named row its new tokens in one forward pass.

        Returns:
            For each row the float32 logits of all its new tokens, `[num_new, vocab_size]`.
        """
        order = sorted(new_tokens, key=lambda row: len(new_tokens[row]) > 1)
        rows = [(self._lengths[row], len(new_tokens[row]), self._blocks[row]) for row in order]
        positions, batch = make_batch(rows, self.block_size)
        input_ids = torch.tensor([token for row in order for token in new_tokens[row]], dtype=torch.int64)
        with torch.inference_mode():
            hidden = self.model.forward(input_ids, positions, batch, self.kv_caches)
            logits = self.model.compute_logits(hidden)
        for row in order:
            self._lengths[row] += len(new_tokens[row])
        return dict(zip(order, logits.split([len(new_tokens[row]) for row in order]), strict=True))


def run_paged(
    model: CausalLM, token_ids: list[int], chunks: Sequence[int] | None = None, block_size: int = 16
) -> torch.Tensor:
    """Float32 logits `[num_tokens, vocab_size]` of one row fed in `chunks` (sizes; None is all at once).

    Tokens that the chunks do not cover are fed one by one, as decodes.
    """
    sizes = [len(token_ids)] if chunks is None else list(chunks)
    sizes += [1] * (len(token_ids) - sum(sizes))
    runner = PagedRunner(model, max_len=len(token_ids), block_size=block_size)
    logits, start = [], 0
    for size in sizes:
        logits.append(runner.step({0: token_ids[start : start + size]})[0])
        start += size
    return torch.cat(logits)


def greedy_paged(
    model: CausalLM,
    token_ids: list[int],
    num_new_tokens: int,
    chunks: Sequence[int] | None = None,
    block_size: int = 16,
) -> list[int]:
    """Greedy continuation of one row: the prompt in `chunks`, then decodes."""
    sizes = [len(token_ids)] if chunks is None else list(chunks)
    assert sum(sizes) == len(token_ids)
    runner = PagedRunner(model, max_len=len(token_ids) + num_new_tokens, block_size=block_size)
    start, logits = 0, torch.empty(0)
    for size in sizes:
        logits = runner.step({0: token_ids[start : start + size]})[0]
        start += size
    out: list[int] = []
    while len(out) < num_new_tokens:
        out.append(int(logits[-1].argmax()))
        logits = runner.step({0: [out[-1]]})[0]
    return out


def assert_greedy_tokens_agree(
    reference_logits: torch.Tensor, token_ids: list[int], num_prompt_tokens: int, tolerance: float = 2e-3
) -> None:
    """Each token after the prompt is the reference's best, or within `tolerance` of it (two logits may tie).

    Args:
        reference_logits: `[num_tokens, vocab_size]` of the reference, teacher-forced with `token_ids`.
        token_ids: prompt and our greedy continuation.
    """
    for index in range(num_prompt_tokens, len(token_ids)):
        row = reference_logits[index - 1]
        gap = float(row.max() - row[token_ids[index]])
        assert gap < tolerance, f"token {index} is {token_ids[index]}, {gap:.4f} below the best {int(row.argmax())}"
