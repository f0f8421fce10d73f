"""Steps that scheduler and allocator made for a hard little workload, recorded while one process served it."""

from __future__ import annotations

import msgspec
from core_ring import CoreRing, pack
from tiny_models import random_token_ids

from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.runner import StepRunner, load_runner
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.ids import Epoch, RequestId
from octavo.messages.request import SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StepExecuted

NUM_BLOCKS, BLOCK_SIZE, MAX_SEQS, DEPTH = 24, 4, 4, 3


def workload() -> list[SubmitRequest]:
    """Prompts longer than a step, a shared prefix, siblings, log-probabilities, penalties, end tokens, draws."""
    shared = random_token_ids(28, seed=4)
    prompts = [
        shared + random_token_ids(9, seed=5),
        shared + random_token_ids(3, seed=6),
        *[random_token_ids(21, seed=7)] * 2,
        random_token_ids(6, seed=8),
        random_token_ids(30, seed=9),
    ]
    params = [
        SamplingParams(temperature=0.0, max_tokens=14, prompt_logprobs=1),
        SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=14, logprobs=2),
        SamplingParams(temperature=1.0, seed=12, max_tokens=12),
        SamplingParams(temperature=1.0, seed=13, max_tokens=12),
        SamplingParams(temperature=0.0, max_tokens=16, repetition_penalty=1.3, logprobs=0),
        SamplingParams(temperature=0.7, top_k=20, min_p=0.02, seed=14, max_tokens=10),
    ]
    return [
        SubmitRequest(
            request_id=RequestId(index),
            prompt_token_ids=pack(prompt),
            params=asked,
            eos_token_ids=tuple(range(3, 20)) if index == 5 else (),
            fork_of=RequestId(2) if index == 3 else RequestId(-1),
        )
        for index, (prompt, asked) in enumerate(zip(prompts, params, strict=True))
    ]


class _Recorder:
    """Stands in a `CoreRing` where its executor does."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        self.epoch = Epoch(0)
        self.streams: dict[RequestId, dict[int, int]] = {}
        self.steps: list[ExecuteStep] = []
        self.executed: list[StepExecuted] = []

    def execute(self, step: ExecuteStep, requests: dict[RequestId, SubmitRequest]) -> StepExecuted:
        executed = self.runner.execute(step)
        self.steps.append(msgspec.structs.replace(step, epoch=Epoch(1)))
        self.executed.append(msgspec.structs.replace(executed, epoch=Epoch(1)))
        return executed


def sized(config: ExecutorConfig) -> ExecutorConfig:
    """The configuration with the sizes that the workload is hard for."""
    return msgspec.structs.replace(
        config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=MAX_SEQS, pipeline_depth=DEPTH, num_threads=1
    )


def record(config: ExecutorConfig) -> tuple[list[ExecuteStep], list[StepExecuted]]:
    """Serve the workload in this process: every step, with several in flight, and what came of it."""
    runner = load_runner(sized(config))
    scheduler = SchedulerConfig(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=runner.device.plan.max_model_len,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=16,
        pipeline_depth=DEPTH,
    )
    ring = CoreRing(scheduler, seed=3, checks=False)
    recorder = _Recorder(runner)
    ring.executor = recorder  # type: ignore[assignment]  # of its methods the ring calls execute alone
    for request in workload():
        ring.submit(request)
    while ring.step_randomly():
        pass
    assert set(ring.ended) == set(ring.requests)
    return recorder.steps, recorder.executed
