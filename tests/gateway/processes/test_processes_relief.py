"""A real replica that takes its time to load: what it had is served by the other one, and does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from engines import Logprobs, exact_engine_on, save_servable
from process_family import living, until

from octavo import Engine
from octavo.messages.sampling import SamplingParams

PATIENCE_S = 400.0
NUM_STREAMS = 8

LOADS_WHEN_TOLD = """
import os, sys, time

# The nursery is started like this; its children inherit what is done here.
if any(part.endswith("runtime.nursery") for part in sys.orig_argv):
    from octavo.actors.executor.rank import RankExecutor

    load = RankExecutor.load

    def load_when_told(self):
        while os.path.exists({hold!r}):
            time.sleep(0.01)
        return load(self)

    RankExecutor.load = load_when_told
"""
"""Put where every Python looks at its start: the product has no hook for this."""


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file exists, no executor loads."""
    hold = tmp_path / "hold"
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(LOADS_WHEN_TOLD.format(hold=str(hold)))
    monkeypatch.syspath_prepend(str(hook))  # the nursery looks where this process looks
    return hold


def run(coroutine: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE_S)

    return asyncio.run(bounded())


def params_of(index: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.8,
        seed=index,
        max_tokens=90,
        ignore_eos=True,
        n=2 if index % 4 == 2 else 1,
        logprobs=2 if index % 3 == 0 else None,
    )


async def answer(engine: Engine, index: int) -> list[Any]:
    output = await engine.generate(list(range(10 + index, 30 + index)), params_of(index))
    return [
        (sequence.token_ids, sequence.text, Logprobs(entry.logprob for entry in sequence.logprobs or ()))
        for sequence in output.outputs
    ]


def test_streams_of_a_replica_whose_executor_died_end_before_its_successor_has_loaded(
    tmp_path: Path, hold: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_servable("llama", model)

    async def scenario() -> None:
        async with exact_engine_on(model, in_process=False, data_parallel_size=2, routing="round_robin") as engine:
            expected = await asyncio.gather(*(answer(engine, index) for index in range(NUM_STREAMS)))
            first = await living("executor 0")
            for _ in range(2):  # once more, with what the engines still remember
                hold.touch()
                before = engine.stats().generation_tokens
                tasks = [asyncio.create_task(answer(engine, index)) for index in range(NUM_STREAMS)]
                await until(lambda before=before: engine.stats().generation_tokens > before)
                first.kill()
                assert await asyncio.gather(*tasks) == expected
                assert hold.exists() and engine.stats().actor_restarts["engine"] == 0
                hold.unlink()
                first = await living("executor 0", other_than=first.pid)
                await until(lambda: not any(replica.why_not_ready for replica in engine._graph.replicas))
                assert await asyncio.gather(*(answer(engine, index) for index in range(NUM_STREAMS))) == expected
            await until(lambda: engine.stats().kv_cache_usage == 0.0 and engine.stats().num_running == 0)

    run(scenario())
