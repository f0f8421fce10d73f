"""Requests that kill the real executor process or engine process, and requests that many clients leave at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from engines import exact_engine_on, save_servable
from process_family import living, named, until

from octavo import Engine
from octavo.messages.errors import RequestQuarantinedError
from octavo.messages.sampling import SamplingParams

PATIENCE_S = 400.0
NUM_STREAMS = 16
NUM_BESIDE = 63  # of one poison
POISON = [255, 254, 253, 255]
POISON_OF_SCHEDULER = [255, 253, 254, 255]
POISON_OF_ALLOCATOR = [255, 252, 254, 255]
POISON_OF_PLANS = [255, 251, 254, 255]

KILLS_ITSELF = f"""
import array, os, signal, sys

# The nursery is started like this; its children inherit what is done here.
if any(part.endswith("runtime.nursery") for part in sys.orig_argv):
    from octavo.actors.executor.runner import StepRunner

    poison = array.array("i", {POISON}).tobytes()
    execute = StepRunner.execute

    def execute_or_die(self, step):
        if any(poison in start.token_ids for start in step.start):
            os.kill(os.getpid(), signal.SIGKILL)
        return execute(self, step)

    StepRunner.execute = execute_or_die

    from octavo.actors.kv_allocator.core import KVAllocatorCore
    from octavo.actors.scheduler.core import SchedulerCore
    from octavo.messages.kv import MatchPrefix
    from octavo.messages.request import SubmitRequest
    from octavo.messages.step import PlanStep

    def raise_at(core, kind, field, poison):
        poison, handle = array.array("i", poison).tobytes(), core.handle

        def handle_or_raise(self, message, now_ns):
            if isinstance(message, kind) and poison in getattr(message, field):
                raise RuntimeError("it cannot bear this")
            return handle(self, message, now_ns)

        core.handle = handle_or_raise

    def tokens_of_plan(plan):
        return b" ".join(start.token_ids for start in plan.start)

    PlanStep.tokens = property(tokens_of_plan)
    raise_at(KVAllocatorCore, PlanStep, "tokens", {POISON_OF_PLANS})
    raise_at(SchedulerCore, SubmitRequest, "prompt_token_ids", {POISON_OF_SCHEDULER})
    raise_at(KVAllocatorCore, MatchPrefix, "token_ids", {POISON_OF_ALLOCATOR})
"""
"""Put where every Python looks at its start: the product has no hook for this."""


def run(coroutine: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE_S)

    return asyncio.run(bounded())


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(KILLS_ITSELF)
    monkeypatch.syspath_prepend(str(hook))  # the nursery looks where this process looks
    folder = tmp_path / "model"
    folder.mkdir()
    save_servable("llama", folder)
    return folder


async def tokens_of(engine: Engine, index: int, max_tokens: int = 90) -> list[int]:
    params = SamplingParams(temperature=0.8, seed=index, max_tokens=max_tokens, ignore_eos=True)
    output = await engine.generate(list(range(10 + index, 30 + index)), params)
    return list(output.outputs[0].token_ids)


def test_f_31_a_poison_request_is_found_refused_and_remembered_and_the_others_lose_nothing(model: Path) -> None:
    async def poison(engine: Engine) -> str:
        with pytest.raises(RequestQuarantinedError) as refused:
            await engine.generate([1, 2, 3, *POISON], SamplingParams(temperature=0.0, max_tokens=5))
        return str(refused.value)

    async def scenario() -> None:
        async with exact_engine_on(model, in_process=False) as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_BESIDE)))
            assert engine.stats().actor_restarts["executor"] == 0
            *got, why = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_BESIDE)), poison(engine))
            assert got == expected
            assert "times in a row" in why
            num_restarts = engine.stats().actor_restarts["executor"]
            assert 2 < num_restarts <= 8, "two, and one for each halving of the 64"
            assert "a short while ago" in await poison(engine)
            await until(lambda: engine.stats().num_quarantined == 1)  # it reports now and then
            engine_process = await living("engine")
            engine_process.kill()
            await living("engine", other_than=engine_process.pid)
            assert "a short while ago" in await poison(engine), "whichever engine there is, it is not tried again"
            assert engine.stats().actor_restarts["executor"] == num_restarts
            assert engine.stats().num_quarantined == 1

    run(scenario())


def test_f_31_of_two_replicas_a_poison_request_takes_both_down_and_is_found_there_all_the_same(model: Path) -> None:
    async def poison(engine: Engine) -> str:
        with pytest.raises(RequestQuarantinedError) as refused:
            await engine.generate([1, 2, 3, *POISON], SamplingParams(temperature=0.0, max_tokens=5))
        return str(refused.value)

    async def scenario() -> None:
        async with exact_engine_on(model, in_process=False, data_parallel_size=2, routing="round_robin") as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)))
            *got, why = await asyncio.gather(
                *(tokens_of(engine, index) for index in range(NUM_STREAMS)), poison(engine)
            )
            assert got == expected
            assert "times in a row" in why
            num_restarts = engine.stats().actor_restarts["executor"]
            assert 1 < num_restarts <= 8
            assert "a short while ago" in await poison(engine)
            assert engine.stats().actor_restarts["executor"] == num_restarts

    run(scenario())


@pytest.mark.parametrize("prompt", [POISON_OF_SCHEDULER, POISON_OF_ALLOCATOR], ids=["scheduler", "allocator"])
def test_f_20_a_request_that_the_engine_itself_cannot_bear_is_ended_and_the_others_lose_nothing(
    model: Path, prompt: list[int]
) -> None:
    async def poison(engine: Engine) -> str:
        with pytest.raises(RequestQuarantinedError) as refused:
            await engine.generate([1, 2, 3, *prompt], SamplingParams(temperature=0.0, max_tokens=5))
        return str(refused.value)

    async def scenario() -> None:
        async with exact_engine_on(model, in_process=False) as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS - 1)))
            *got, why = await asyncio.gather(
                *(tokens_of(engine, index) for index in range(NUM_STREAMS - 1)), poison(engine)
            )
            assert got == expected
            assert "the engine failed 2 times in a row" in why and "cannot bear" in why
            await until(lambda: engine.is_ready)
            assert engine.stats().actor_restarts["engine"] == 2 and engine.stats().num_quarantined == 1
            assert "a short while ago" in await poison(engine)
            assert await tokens_of(engine, 0) == expected[0]
            assert engine.stats().actor_restarts["engine"] == 2
            assert engine.stats().actor_restarts["executor"] == 0

    run(scenario())


def test_f_20_a_request_at_which_the_engine_fails_in_a_step_of_many_is_found_among_them(model: Path) -> None:
    async def poison(engine: Engine) -> str:
        with pytest.raises(RequestQuarantinedError) as refused:
            await engine.generate([1, 2, 3, *POISON_OF_PLANS], SamplingParams(temperature=0.0, max_tokens=5))
        return str(refused.value)

    async def scenario() -> None:
        async with exact_engine_on(model, in_process=False) as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS - 1)))
            *got, why = await asyncio.gather(
                *(tokens_of(engine, index) for index in range(NUM_STREAMS - 1)), poison(engine)
            )
            assert got == expected
            assert "times in a row" in why and "cannot bear" in why
            await until(lambda: engine.is_ready)
            num_restarts = engine.stats().actor_restarts["engine"]
            assert 2 <= num_restarts <= 2 + 4 + 1, "two, one for each halving of the sixteen, and the last one's"
            assert "a short while ago" in await poison(engine)
            assert engine.stats().actor_restarts["engine"] == num_restarts

    run(scenario())


def test_f_55_half_of_the_clients_leave_at_once_and_the_others_notice_nothing(model: Path) -> None:
    async def scenario() -> None:
        async with exact_engine_on(model, in_process=False, num_blocks=2048) as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)))
            tasks = [asyncio.create_task(tokens_of(engine, index)) for index in range(2 * NUM_STREAMS)]
            before = engine.stats().generation_tokens
            await until(lambda: engine.stats().generation_tokens >= before + 2 * NUM_STREAMS)
            for task in tasks[NUM_STREAMS:]:
                task.cancel()
            assert await asyncio.gather(*tasks[:NUM_STREAMS]) == expected
            await until(lambda: not (engine.stats().num_running or engine.stats().kv_cache_usage))
            assert engine.stats().num_live == 0

    run(scenario())


def test_f_08_an_executor_that_hung_is_dead_before_another_takes_its_place(model: Path) -> None:
    async def scenario() -> None:
        async with exact_engine_on(model, in_process=False) as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)))
            old = await living("executor 0")
            tasks = [asyncio.create_task(tokens_of(engine, index)) for index in range(NUM_STREAMS)]
            await asyncio.sleep(0)
            old.suspend()
            await living("executor 0", other_than=old.pid)
            assert old not in named("executor 0"), "nobody can let it go on"
            assert await asyncio.gather(*tasks) == expected

    run(scenario())
