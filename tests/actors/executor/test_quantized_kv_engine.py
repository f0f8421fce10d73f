"""Whole engines whose KV cache is quantised: prefixes are reused, requests preempted, tokens stay the model's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engines import engine_on, save_servable
from tiny_models import greedy_reference, random_token_ids

from octavo import SamplingParams

PROMPT = random_token_ids(21, seed=4)
NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Greedy tokens of this model after `PROMPT` lead by a wide margin: see test_quantized_kv.py."""
    folder = tmp_path_factory.mktemp("quantized_kv_engine") / "tiny"
    return folder, save_servable("qwen3", folder, seed=1, initializer_range=0.05)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_cached_prefix_and_a_preemption_change_no_token(dtype: str, checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint
    expected = greedy_reference(model, PROMPT, NUM_NEW)

    async def run() -> None:
        # 4 requests of 33 tokens would take 36 blocks; those that find no room are preempted and computed again.
        async with engine_on(folder, kv_cache_dtype=dtype, num_blocks=20, max_model_len=40) as engine:
            first = await engine.generate(PROMPT, GREEDY)
            again = await engine.generate(PROMPT, GREEDY)
            assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 20)
            others = [random_token_ids(21, seed=100 + seed) for seed in range(3)]
            found = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in (*others, PROMPT)))
            assert engine.stats().num_preemptions > 0
            for answer in (first, again, found[-1]):
                assert list(answer.outputs[0].token_ids) == expected

    asyncio.run(run())
