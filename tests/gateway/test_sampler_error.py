"""F-24: a sampler that raises over one row, time and again, costs the request of that row and no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import exact_engine_on, save_servable

from octavo import Engine
from octavo.actors.executor import sampler
from octavo.actors.executor.sampler import Sampler
from octavo.actors.executor.sampling_batch import BatchBuilder
from octavo.messages.errors import RequestFailedError
from octavo.messages.sampling import SamplingParams

PATIENCE_S = 240.0
NUM_STREAMS = 7
BAD_SEED = 4711


async def tokens_of(engine: Engine, index: int) -> list[int]:
    params = SamplingParams(temperature=0.8, seed=index, max_tokens=30, repetition_penalty=1.2, ignore_eos=True)
    output = await engine.generate(list(range(10 + index, 30 + index)), params)
    return list(output.outputs[0].token_ids)


def raise_over(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, seeds_of: Callable[..., list[int | None]]
) -> None:
    """Let a part of sampling raise whenever the bad request has a part in it."""
    whole = getattr(where, name)

    def raise_or_go_on(*arguments: Any, **options: Any) -> Any:
        if BAD_SEED in seeds_of(*arguments):
            raise IndexError("a penalty of a token that is none")
        return whole(*arguments, **options)

    monkeypatch.setattr(where, name, raise_or_go_on)


PLACES: list[tuple[Any, str, Callable[..., list[int | None]]]] = [
    (Sampler, "add", lambda _, __, params, *___: [params.seed]),
    (BatchBuilder, "build", lambda _, __, requests: [each.params.seed for each in requests]),
    (sampler, "choose", lambda _, group: [each.params.seed for each in group.requests]),
    (Sampler, "_report", lambda _, batch, *__: [each.params.seed for each in batch.requests]),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_f_24_a_row_over_which_the_sampler_raises_ends_alone_and_the_others_are_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str, Callable[..., list[int | None]]]
) -> None:
    save_servable("llama", tmp_path)

    async def bad(engine: Engine) -> str:
        params = SamplingParams(temperature=0.8, seed=BAD_SEED, max_tokens=30, repetition_penalty=1.2)
        with pytest.raises(RequestFailedError) as ended:
            await engine.generate([1, 2, 3, 4], params)
        return str(ended.value)

    async def scenario() -> None:
        async with exact_engine_on(tmp_path) as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)))
            raise_over(monkeypatch, *place)
            *got, why = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)), bad(engine))
            assert got == expected
            assert "could not be sampled" in why and "a penalty of a token that is none" in why
            assert engine.stats().num_quarantined == engine.stats().actor_restarts["executor"] == 0
            assert "could not be sampled" in await bad(engine), "also with nobody beside it"
            assert await tokens_of(engine, 0) == expected[0]
            assert engine.stats().actor_restarts["executor"] == 0

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))


def test_f_24_a_sampler_that_raises_over_every_row_is_the_executor_s_fault_and_costs_no_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_servable("llama", tmp_path)
    report, raised = Sampler._report, []

    def raise_in_one_step(*arguments: Any) -> Any:
        if len(raised) <= NUM_STREAMS:  # all together, then each
            raised.append(1)
            raise IndexError("a penalty of a token that is none")
        return report(*arguments)

    async def scenario() -> None:
        async with exact_engine_on(tmp_path) as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)))
            streams = asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)))
            before = engine.stats().generation_tokens
            while engine.stats().generation_tokens < before + 5 * NUM_STREAMS:
                await asyncio.sleep(0)
            monkeypatch.setattr(Sampler, "_report", raise_in_one_step)
            assert await streams == expected
            assert engine.stats().actor_restarts["executor"] == 1

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
