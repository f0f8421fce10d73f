"""F-13: whichever handler of an actor raises, every request ends, and the engine says whether it still serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import engine_on, save_servable

from octavo import Engine
from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.errors import OctavoError
from octavo.messages.kv import ResetPrefixCache
from octavo.messages.sampling import SamplingParams
from octavo.messages.system import Drain

PATIENCE_S = 120.0
SAID_BY_THE_ENGINE = {"Drain": Drain(), "ResetPrefixCache": ResetPrefixCache()}
IS_SAID_IN_A_RACE = {"ReleaseMatch"}
HANDLERS = [
    *(
        ("scheduler", kind.__name__)
        for kind in SchedulerCore(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=16))._handlers
    ),
    *(
        ("allocator", kind.__name__)
        for kind in KVAllocatorCore(AllocatorConfig(num_blocks=8, block_size=4))._handlers
        if kind.__name__ not in IS_SAID_IN_A_RACE
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder)
    return folder


async def all_kinds_of_requests(engine: Engine) -> list[Any]:
    """Requests that make what is said of requests be said; returns what each came to."""
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    with_stop = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=("e", "a", "o", "\ufffd"))
    twins = SamplingParams(temperature=0.5, seed=1, n=2, max_tokens=30, ignore_eos=True)
    tasks = [
        asyncio.create_task(engine.generate(list(range(20 + index, 40 + index)), chosen))
        for index, chosen in enumerate((params, with_stop, twins, params))
    ]
    cancelled = asyncio.create_task(engine.generate(list(range(50, 80)), params))
    for _ in range(20):
        await asyncio.sleep(0)
    cancelled.cancel()
    ends = await asyncio.gather(*tasks, cancelled, return_exceptions=True)
    return [end for end in ends if not isinstance(end, asyncio.CancelledError)]


def fail_a_step(engine: Engine) -> None:
    """Let the next step raise, so that the executor is lost."""
    device: Any = engine._graph.executor._runner.device
    forward = device.forward

    def fail(*args: Any) -> Any:
        device.forward = forward
        raise RuntimeError("a step failed")

    device.forward = fail


def raise_in(engine: Engine, actor: str, kind: str) -> Callable[[], bool]:
    """Let a handler raise, once; returns what tells whether it has."""
    core: Any = getattr(engine._graph, actor)
    (message,) = [message for message in core._handlers if message.__name__ == kind]
    handler, raised = core._handlers[message], []

    def fail(_: Any) -> Any:
        core._handlers[message] = handler
        raised.append(kind)
        raise ZeroDivisionError("a defect")

    core._handlers[message] = fail
    return lambda: bool(raised)


@pytest.mark.parametrize(("actor", "kind"), HANDLERS)
def test_f_13_an_exception_in_any_handler_ends_every_request_and_is_told(model: Path, actor: str, kind: str) -> None:
    async def scenario() -> None:
        engine = engine_on(model)
        async with engine:
            has_raised = raise_in(engine, actor, kind)
            fail_a_step(engine)
            ends = await all_kinds_of_requests(engine)
            if kind in SAID_BY_THE_ENGINE:
                engine._graph.send(SAID_BY_THE_ENGINE[kind])
                while not has_raised():
                    await asyncio.sleep(0)
            assert has_raised()
            assert all(isinstance(end, OctavoError) or end.outputs[0].finish_reason for end in ends), ends
            assert not engine.is_ready and "failed" in engine.why_not_ready, "it is no secret"
            with pytest.raises(OctavoError):
                await engine.generate([1, 2, 3], SamplingParams(max_tokens=1))

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
