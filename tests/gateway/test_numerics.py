"""Models that compute no numbers: F-14 (for one request) and F-15 (for all), in one process and in several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_on, save_servable, tokens_of, tokens_of_all
from launch_tools import ThreadStream
from nursery_hooks import run_first
from process_family import named

from octavo import Engine
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.device import Device
from octavo.actors.executor.gpu.runner import GpuRunner
from octavo.gateway.api.http_errors import from_ended
from octavo.gateway.api.metrics import ERROR_CODES
from octavo.messages.errors import ModelNumericsError
from octavo.messages.ids import RequestId
from octavo.messages.request import RequestEnded

PATIENCE_S = 120.0
NUM_STREAMS = 8

IS_SICK = """
import os, sys
from pathlib import Path

# The nursery is started like this; its children inherit what is done here.
if any(part.endswith("runtime.nursery") for part in sys.orig_argv):
    from octavo.actors.executor.device import Device

    sick = Path(os.environ["SICK"])
    logits = Device.logits

    def perhaps_none(self, *args):
        values = logits(self, *args)
        if sick.exists() and sick.read_text() in ("all", str(os.getpid())):
            values = values * float("nan")
        return values

    Device.logits = perhaps_none
"""
"""Put where every Python looks at its start: an executor whose pid (or `all`) stands in a file computes NaN."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_servable("llama", folder)
    return folder


@pytest.fixture
def sick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_first(IS_SICK, tmp_path / "hook", monkeypatch)
    monkeypatch.setenv("SICK", str(tmp_path / "sick"))
    return tmp_path / "sick"


def spoil(engine: Engine, choose: Callable[[int], slice | int]) -> None:
    """Let rows of every step come to NaN: `choose` names them, of so many."""
    model: Any = engine._graph.executor._runner.device.model
    compute = model.compute_logits

    def spoilt(*args: Any) -> torch.Tensor:
        logits: torch.Tensor = compute(*args).clone()
        logits[choose(len(logits))] = torch.nan
        return logits

    model.compute_logits = spoilt


def load_ahead(config: ExecutorConfig) -> GpuRunner:
    """What serves on a GPU, its device a thread beside it."""
    return GpuRunner(
        Device(config),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        pipeline_depth=config.pipeline_depth,
        block_size=config.block_size,
        graph_sizes=(1, 4),
        stream=ThreadStream(),
    )


def run(coroutine: Any) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(coroutine, PATIENCE_S)

    asyncio.run(bounded())


def test_f_14_a_request_for_which_the_model_computes_nan_ends_alone(model: Path) -> None:
    async def scenario() -> None:
        async with engine_on(model) as engine:
            expected = await tokens_of_all(engine, NUM_STREAMS)
            runner: Any = engine._graph.executor._runner
            choose_tokens, poison = runner._sampler.sample, []

            def sample(logits: torch.Tensor, request_ids: tuple[RequestId, ...]) -> Any:
                if not poison and len(request_ids) > 2:
                    poison.append(request_ids[1])
                if poison and poison[0] in request_ids:
                    logits = logits.clone()
                    logits[request_ids.index(poison[0])] = torch.inf
                return choose_tokens(logits, request_ids)

            runner._sampler.sample = sample
            got = await asyncio.gather(
                *(tokens_of(engine, index) for index in range(NUM_STREAMS)), return_exceptions=True
            )
            (sick,) = [index for index, answer in enumerate(got) if isinstance(answer, BaseException)]
            assert isinstance(got[sick], ModelNumericsError) and "infinite" in str(got[sick])
            assert got[:sick] + got[sick + 1 :] == expected[:sick] + expected[sick + 1 :]
            assert engine.stats().actor_restarts["executor"] == 0 and engine.stats().num_numerics_losses == 0

    run(scenario())


@pytest.mark.parametrize("launches_ahead", [False, True], ids=["a runner that waits", "one that launches ahead"])
def test_f_15_a_model_that_computes_only_nan_costs_one_retry_then_clear_errors_and_the_engine_still_answers(
    model: Path, launches_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launches_ahead:
        monkeypatch.setattr("octavo.actors.executor.actor.load_runner", load_ahead)

    async def scenario() -> None:
        async with engine_on(model) as engine:
            assert isinstance(engine._graph.executor._runner, GpuRunner) == launches_ahead
            expected = await tokens_of_all(engine, NUM_STREAMS)
            served: Any = engine._graph.executor._runner.device.model
            compute = served.compute_logits
            spoil(engine, lambda num_rows: slice(0, num_rows))
            got = await asyncio.gather(
                *(tokens_of(engine, index) for index in range(NUM_STREAMS)), return_exceptions=True
            )
            assert all(isinstance(answer, ModelNumericsError) for answer in got), got
            stats = engine.stats()
            assert (stats.num_numerics_losses, stats.actor_restarts["executor"]) == (1, 1)
            assert stats.num_quarantined == 0
            served.compute_logits = compute
            assert await tokens_of_all(engine, NUM_STREAMS) == expected

    run(scenario())


def test_f_15_an_executor_that_computes_only_nan_is_replaced_by_another_process_and_no_stream_notices(
    model: Path, sick: Path
) -> None:
    async def scenario() -> None:
        async with engine_on(model, in_process=False) as engine:
            expected = await tokens_of_all(engine, NUM_STREAMS)
            (executor,) = named("executor 0")

            def sicken() -> None:
                sick.with_suffix(".new").write_text(str(executor.pid))
                sick.with_suffix(".new").rename(sick)

            assert await tokens_of_all(engine, NUM_STREAMS, sicken) == expected
            await asyncio.to_thread(executor.wait)
            while engine.stats().num_numerics_losses != 1:  # told a few times a second
                await asyncio.sleep(0.01)
            assert engine.stats().actor_restarts["executor"] == 1
            assert engine.stats().num_quarantined == 0
            assert await tokens_of_all(engine, NUM_STREAMS) == expected

    run(scenario())


def test_f_14_the_client_hears_a_clear_error_and_metrics_know_its_code() -> None:
    ended = RequestEnded(
        RequestId(1), "error", 0, error_code=ModelNumericsError.code, error="the model computed NaN logits"
    )
    error = from_ended(ended)
    assert (error.status, error.code) == (500, "model_numerics")
    assert "no numbers" in str(error)
    assert ModelNumericsError.code in ERROR_CODES
