"""A real executor that has no processor, as on a host with too much to do: it is waited for, and blamed for nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import structlog
from engines import exact_engine_on, save_servable
from process_family import living, until
from starved_processes import HOOK, Starver, can_starve, ran_ns

from octavo import Engine
from octavo.messages.sampling import SamplingParams

PATIENCE_S = 400.0
NUM_STREAMS = 8
MAX_TOKENS = 600
STARVED_S = 6.0  # silence alone is death after 1.5 s; a child that is not let run has 10


class Streams:
    """Several streams beside each other, of which it is known how far they are."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.texts = [""] * NUM_STREAMS
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> list[str]:
        await asyncio.gather(*map(self._one, range(NUM_STREAMS)))
        return self.texts

    async def _one(self, index: int) -> None:
        params = SamplingParams(temperature=0.8 * (index % 2), seed=index, max_tokens=MAX_TOKENS, ignore_eos=True)
        async for delta in self._engine.stream(list(range(10 + index, 30 + index)), params):
            self.texts[index] += delta.text

    @property
    def have_begun(self) -> bool:
        return all(self.texts)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hook, folder = tmp_path / "hook", tmp_path / "model"
    hook.mkdir()
    folder.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    monkeypatch.syspath_prepend(str(hook))  # the nursery looks where this process looks
    save_servable("llama", folder, max_position_embeddings=1024)
    return folder


async def check_waited_for(engine: Engine, starver: Starver, expected: list[str]) -> None:
    """Starve the executor for less than its limit."""
    executor, streams = await living("executor 0"), Streams(engine)
    await until(lambda: streams.have_begun)
    ran_before_ns, since_s = ran_ns(executor), time.monotonic()
    with starver.starve(executor):
        await until(lambda: time.monotonic() - since_s > STARVED_S)
        assert ran_ns(executor) - ran_before_ns < 0.05e9 * STARVED_S, "it was to be starved"
        assert not streams.task.done()
    assert await streams.task == expected
    assert not any(engine.stats().actor_restarts.values())
    assert (await living("executor 0")).pid == executor.pid


async def check_replaced(engine: Engine, starver: Starver, expected: list[str]) -> None:
    """Starve the executor until it is given up."""
    executor, streams = await living("executor 0"), Streams(engine)
    await until(lambda: streams.have_begun)
    with structlog.testing.capture_logs() as lines:
        with starver.starve(executor):
            await until(lambda: any(line["event"] == "executor.lost" for line in lines))
        # Even to die it needs a processor, and none takes its place before.
        assert await streams.task == expected
    (lost,) = (line for line in lines if line["event"] == "executor.lost")
    assert "hangs" in lost["why"] and lost["is_innocent"]
    assert engine.stats().actor_restarts | {"executor": 1} == engine.stats().actor_restarts
    assert sum(engine.stats().actor_restarts.values()) == 1, "nobody else was blamed either"
    assert engine.stats().num_quarantined == 0


@pytest.mark.skipif(not can_starve(), reason="needs Linux with schedstat, and two processors")
def test_f_09_an_executor_without_a_processor_is_waited_for_then_replaced_and_no_request_is_blamed(model: Path) -> None:
    async def scenario() -> None:
        async with exact_engine_on(model, in_process=False, num_blocks=2048, max_model_len=1024) as engine:
            starver = await Starver.of_nursery()
            try:
                expected = await Streams(engine).task
                await check_waited_for(engine, starver, expected)
                await check_replaced(engine, starver, expected)
            finally:
                starver.close()

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
