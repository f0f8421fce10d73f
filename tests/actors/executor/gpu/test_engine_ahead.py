"""The whole engine over a runner that launches ahead, its device a thread beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engines import engine_on, save_servable
from launch_tools import ThreadStream
from tiny_models import greedy_reference, random_token_ids

from octavo import SamplingParams
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.device import Device
from octavo.actors.executor.gpu.runner import GpuRunner

PROMPTS = [random_token_ids(21, seed=1), random_token_ids(9, seed=2), random_token_ids(13, seed=3)]
NUM_NEW_TOKENS = 32

WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "chunked prefill": {"max_num_batched_tokens": 6, "max_num_seqs": 3},
    "prefix hit": {"rounds": 2},
    "preempted": {"num_blocks": 16, "max_model_len": 64, "enable_prefix_caching": False},
    "three in flight": {"pipeline_depth": 3},
    "one in flight": {"pipeline_depth": 1},
}


def load_ahead(config: ExecutorConfig) -> GpuRunner:
    """As `load_runner` on a GPU."""
    return GpuRunner(
        Device(config),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=64,
        pipeline_depth=config.pipeline_depth,
        block_size=config.block_size,
        graph_sizes=(1, 4),
        stream=ThreadStream(),
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("octavo.actors.executor.actor.load_runner", load_ahead)
    return tmp_path


async def run(folder: Path, params: SamplingParams, fields: dict[str, Any]) -> list[list[int]]:
    fields = dict(fields)
    rounds = fields.pop("rounds", 1)
    async with engine_on(folder, **{"pipeline_depth": 2, **fields}) as engine:
        for _ in range(rounds):
            outputs: list[Any] = await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS))
        if "num_blocks" in fields:
            assert engine.stats().num_preemptions > 0
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens_are_those_of_transformers_however_they_are_scheduled(folder: Path) -> None:
    reference = save_servable("qwen3", folder)
    expected = [greedy_reference(reference, prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    for way, fields in WAYS.items():
        assert asyncio.run(run(folder, params, fields)) == expected, way


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_draws_do_not_depend_on_the_schedule(folder: Path, penalty: float) -> None:
    save_servable("qwen3", folder)
    params = SamplingParams(
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        seed=77,
        max_tokens=NUM_NEW_TOKENS,
        ignore_eos=True,
        frequency_penalty=penalty,
    )
    alone = asyncio.run(run(folder, params, WAYS["alone"]))
    assert len({tuple(row) for row in alone}) == len(PROMPTS)
    for way, fields in WAYS.items():
        assert asyncio.run(run(folder, params, fields)) == alone, way


def test_what_is_compiled_by_a_step_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_servable("qwen3", folder)

    async def main() -> None:
        async with engine_on(folder) as engine:
            assert engine.stats().num_late_compilations == 0
            monkeypatch.setattr(GpuRunner, "num_late", 2)
            assert engine.stats().num_late_compilations == 2

    asyncio.run(main())


def test_siblings_and_cancelled_requests_leave_the_others_as_they_are(folder: Path) -> None:
    save_servable("qwen3", folder)
    params = SamplingParams(temperature=0.8, seed=5, n=3, max_tokens=20, ignore_eos=True)

    async def main() -> tuple[Any, Any]:
        async with engine_on(folder, pipeline_depth=2) as engine:
            quiet = await engine.generate(PROMPTS[0], params)
            task = asyncio.create_task(engine.generate(PROMPTS[1], params))
            await asyncio.sleep(0)
            other = asyncio.create_task(engine.generate(PROMPTS[0], params))
            await asyncio.sleep(0)
            task.cancel()
            return quiet, await other

    quiet, other = asyncio.run(main())
    assert [choice.token_ids for choice in other.outputs] == [choice.token_ids for choice in quiet.outputs]
    assert len({tuple(choice.token_ids) for choice in quiet.outputs}) == 3


def test_a_step_that_raises_is_an_executor_that_failed_and_the_streams_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = save_servable("qwen3", folder)
    launch, launched = GpuRunner.launch, []

    def launch_or_fail(self: GpuRunner, step: Any) -> Any:
        launched.append(step.step_id)
        if len(launched) == 9:
            raise RuntimeError("the device is gone")
        return launch(self, step)

    monkeypatch.setattr(GpuRunner, "launch", launch_or_fail)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    tokens = asyncio.run(run(folder, params, {}))
    assert len(launched) > 9
    assert tokens == [greedy_reference(reference, prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]
