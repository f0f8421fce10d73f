"""F-24: a sampler that raises over one row, time and again, costs the request of that row and no other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engines import engine_on, save_servable

from octavo import Engine
from octavo.actors.executor.sampler import Sampler
from octavo.messages.errors import RequestQuarantinedError
from octavo.messages.sampling import SamplingParams

PATIENCE_S = 240.0
NUM_STREAMS = 7
BAD_SEED = 4711


async def tokens_of(engine: Engine, index: int) -> list[int]:
    params = SamplingParams(temperature=0.8, seed=index, max_tokens=30, repetition_penalty=1.2, ignore_eos=True)
    output = await engine.generate(list(range(10 + index, 30 + index)), params)
    return list(output.outputs[0].token_ids)


def test_f_24_a_row_over_which_the_sampler_raises_ends_alone_and_the_others_are_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_servable("llama", tmp_path)
    record = Sampler._record

    def record_unless_bad(self: Sampler, batch: Any, *arguments: Any) -> Any:
        if any(request.params.seed == BAD_SEED for request in batch.requests):
            raise IndexError("a penalty of a token that is none")
        return record(self, batch, *arguments)

    async def bad(engine: Engine) -> str:
        params = SamplingParams(temperature=0.8, seed=BAD_SEED, max_tokens=30, repetition_penalty=1.2)
        with pytest.raises(RequestQuarantinedError) as ended:
            await engine.generate([1, 2, 3, 4], params)
        return str(ended.value)

    async def scenario() -> None:
        async with engine_on(tmp_path) as engine:
            expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)))
            monkeypatch.setattr(Sampler, "_record", record_unless_bad)
            *got, why = await asyncio.gather(*(tokens_of(engine, index) for index in range(NUM_STREAMS)), bad(engine))
            assert got == expected
            assert "times in a row" in why
            assert engine.stats().num_quarantined == 1
            assert engine.stats().actor_restarts["executor"] <= 2 + 3, "two, and one for each halving of the eight"
            assert await tokens_of(engine, 0) == expected[0]

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
