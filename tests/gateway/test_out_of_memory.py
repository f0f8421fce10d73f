"""F-11: a step for which there is no memory is taken in halves; a request that needs too much alone ends alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import exact_engine_on, save_servable

from octavo import Engine
from octavo.messages.errors import OutOfMemoryError
from octavo.messages.sampling import SamplingParams

PATIENCE_S = 240
NUM_REQUESTS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder)
    return folder


async def tokens_of(engine: Engine, index: int, num_prompt: int = 20) -> list[int]:
    params = SamplingParams(temperature=0.8, seed=index, max_tokens=24, ignore_eos=True)
    output = await engine.generate(list(range(10 + index, 10 + index + num_prompt)), params)
    return list(output.outputs[0].token_ids)


async def all_tokens(engine: Engine) -> list[list[int]]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_REQUESTS)))


def run_out_of_memory(engine: Engine, is_too_much: Callable[[Any], bool]) -> list[int]:
    """Let steps that are too much raise; returns where the number of rows of each is noted."""
    runner: Any = engine._graph.executor._runner
    execute = runner.execute
    failed: list[int] = []

    def failing(step: Any) -> Any:
        if step.request_ids and is_too_much(step):
            failed.append(len(step.request_ids))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(step)

    runner.execute = failing
    return failed


@pytest.mark.parametrize("most_rows", [1, 3, 8])
def test_f_11_a_step_without_memory_is_taken_in_halves_and_no_request_is_lost(model: Path, most_rows: int) -> None:
    async def scenario() -> None:
        async with exact_engine_on(model) as engine:
            expected = await all_tokens(engine)
            failed = run_out_of_memory(engine, lambda step: len(step.request_ids) > most_rows)
            assert await all_tokens(engine) == expected
            assert 0 < len(failed) <= 4, failed
            assert await all_tokens(engine) == expected
            assert len(failed) <= 4, "it is remembered"
            assert engine.stats().num_quarantined == 0 and engine.is_ready

    asyncio.run(scenario())


def test_f_11_a_request_that_needs_too_much_alone_ends_with_a_reason_and_the_others_go_on(model: Path) -> None:
    async def scenario() -> None:
        async with exact_engine_on(model) as engine:
            expected = await all_tokens(engine)
            run_out_of_memory(engine, lambda step: any(len(start.token_ids) > 4 * 60 for start in step.start))
            async with asyncio.timeout(PATIENCE_S):
                too_long = asyncio.create_task(tokens_of(engine, 0, num_prompt=70))
                assert await all_tokens(engine) == expected
                with pytest.raises(OutOfMemoryError, match="no memory for this request, even alone: OutOfMemoryError"):
                    await too_long
            assert engine.stats().num_quarantined == 0 and engine.is_ready

    asyncio.run(scenario())
