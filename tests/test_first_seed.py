"""Tests compare drawn tokens of float32 in batches of all sizes: with their seeds, no last bit decides a draw."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from engines import FIRST_SEED, engine_on, save_servable

from octavo.actors.executor import sampler
from octavo.actors.executor.sampling_batch import Group
from octavo.messages.sampling import SamplingParams

MOVED = 1e-6  # at most, as was seen, an edge between two tokens by other batches, of all probability
DRAWN = [
    (index, temperature, n)
    for index in range(0, 8, 2)
    for temperature, n in ((0.8, 1), (0.9, 2 if index % 4 == 2 else 1))
]
"""Streams of `engines.tokens_of`, of `test_processes.py` and of `test_nodes.py`, without those that are greedy."""


def test_no_draw_of_the_streams_that_are_compared_is_near_an_edge_between_two_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_servable("llama", tmp_path)
    choose = sampler.choose
    nearest: list[float] = []

    def measure_and_choose(logits: torch.Tensor, group: Group) -> torch.Tensor:
        scaled = logits.double() / group.filters.temperature.double().unsqueeze(1)
        uniforms = [[r.draws[r.num_output_tokens - r.first_draw]] for r in group.requests]
        edges = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
        nearest.extend((edges - torch.tensor(uniforms, dtype=torch.float64)).abs().amin(dim=-1).tolist())
        return choose(logits, group)

    async def run() -> None:
        async with engine_on(tmp_path) as engine:
            monkeypatch.setattr(sampler, "choose", measure_and_choose)
            for index, temperature, n in DRAWN:
                seed = FIRST_SEED + index
                params = SamplingParams(temperature=temperature, seed=seed, n=n, max_tokens=90, ignore_eos=True)
                await engine.generate(list(range(10 + index, 30 + index)), params)

    asyncio.run(run())
    assert len(nearest) == 90 * sum(n for *_, n in DRAWN)
    assert min(nearest) > 5 * MOVED, "take another first seed"
