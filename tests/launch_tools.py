"""Runners that launch ahead, driven over steps that scheduler and allocator made; and a device that is never early."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from core_ring import CoreRing, pack
from recorded_steps import BLOCK_SIZE, DEPTH, MAX_SEQS, NUM_BLOCKS, sized
from tiny_models import random_token_ids

from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.device import Device
from octavo.actors.executor.gpu.runner import GpuRunner
from octavo.actors.executor.gpu.stream import Completion, Stream
from octavo.actors.executor.runner import StepRunner
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.ids import RequestId
from octavo.messages.request import SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StepExecuted

GRAPH_SIZES = (1, 2, MAX_SEQS)
GRAPH_TOKENS = (5, 16)


class LateStream:
    """A device that does nothing before it is waited for: whoever takes for done what is not, or writes what is still
    to be read, gets wrong tokens."""

    def __init__(self) -> None:
        self._queue: deque[_Late] = deque()

    def submit(self, work: Callable[[], None]) -> Completion:
        late = _Late(self, work)
        self._queue.append(late)
        return late

    def work_off(self, until: _Late) -> None:
        while not until.is_done():
            self._queue.popleft().do()


class _Late:
    def __init__(self, stream: LateStream, work: Callable[[], None]) -> None:
        self._stream, self._work, self._is_done = stream, work, False

    def do(self) -> None:
        self._work()
        self._is_done = True

    def is_done(self) -> bool:
        return self._is_done

    def wait(self) -> None:
        self._stream.work_off(self)


class ThreadStream:
    """A device that works beside the host, in order, on a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)

    def submit(self, work: Callable[[], None]) -> Completion:
        return _OnThread(self._pool.submit(work))


class _OnThread:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def is_done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self._future.result()


def config_of(folder: Path, **fields: Any) -> ExecutorConfig:
    """Of a tiny checkpoint, with the sizes of `recorded_steps`."""
    return sized(ExecutorConfig(model_path=str(folder), dtype="float32", **fields))


def gpu_runner(
    config: ExecutorConfig,
    *,
    graph_sizes: Sequence[int] = GRAPH_SIZES,
    graph_tokens: Sequence[int] = (),
    stream: Stream | None = None,
) -> GpuRunner:
    """The GPU's runner on this CPU."""
    return GpuRunner(
        Device(config),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=16,
        pipeline_depth=config.pipeline_depth,
        block_size=config.block_size,
        graph_sizes=graph_sizes,
        graph_tokens=graph_tokens,
        stream=stream,
    )


def step_runner(config: ExecutorConfig) -> StepRunner:
    """What its tokens are held against."""
    return StepRunner(
        Device(config),
        max_num_seqs=config.max_num_seqs,
        pipeline_depth=config.pipeline_depth,
        block_size=config.block_size,
    )


def plain_workload() -> list[SubmitRequest]:
    """What the device samples by itself: greedy, drawn, filtered, with log-probabilities.

    With end tokens, siblings, a shared prefix, prompts longer than a step, and more than the cache holds at once.
    """
    shared = random_token_ids(28, seed=4)
    prompts = [
        shared + random_token_ids(9, seed=5),
        shared + random_token_ids(3, seed=6),
        *[random_token_ids(21, seed=7)] * 2,
        random_token_ids(6, seed=8),
        random_token_ids(30, seed=9),
        random_token_ids(1, seed=10),
    ]
    params = [
        SamplingParams(temperature=0.0, max_tokens=14),
        SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=24, logprobs=2),
        SamplingParams(temperature=1.0, seed=12, max_tokens=12),
        SamplingParams(temperature=1.0, seed=13, max_tokens=12),
        SamplingParams(temperature=0.0, max_tokens=26, logprobs=0),
        SamplingParams(temperature=0.7, top_k=20, min_p=0.02, seed=14, max_tokens=20),
        SamplingParams(temperature=1.3, top_k=100, seed=15, max_tokens=30, stop_token_ids=(9, 10, 11)),
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


class _Ring(CoreRing):
    """A `CoreRing` whose executor launches ahead: results come back as late as the pipeline allows, or at random."""

    def __init__(self, runner: GpuRunner | StepRunner, config: SchedulerConfig, seed: int) -> None:
        super().__init__(config, seed=seed, checks=False)
        self.runner = runner
        self.in_flight: deque[Any] = deque()
        self.steps: list[ExecuteStep] = []
        self.results: list[StepExecuted] = []
        self.most_in_flight = 0
        self.executor.execute = self._execute  # type: ignore[method-assign]

    def _execute(self, step: ExecuteStep, _requests: object) -> StepExecuted | None:
        self.steps.append(step)
        self.in_flight.append(self.runner.launch(step))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        if len(self.in_flight) >= self.runner.max_launched:
            return self.collect()
        return None

    def collect(self) -> StepExecuted:
        executed = self.runner.collect(self.in_flight.popleft())
        self.results.append(executed)
        return executed

    def step_randomly(self) -> bool:
        if super().step_randomly():
            return True
        if self.in_flight:
            self.edges["executed"].append(self.collect())
            return True
        return False


class Served(msgspec.Struct):
    """What was executed, what came of each step, and how far ahead the runner was."""

    steps: list[ExecuteStep]
    results: list[StepExecuted]
    most_in_flight: int
    num_preemptions: int
    num_prefix_hits: int


def serve(runner: GpuRunner | StepRunner, requests: Sequence[SubmitRequest], seed: int = 3) -> Served:
    """Serve requests to their end, by scheduler and allocator."""
    config = SchedulerConfig(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=runner.device.plan.max_model_len,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=16,
        pipeline_depth=DEPTH,
    )
    ring = _Ring(runner, config, seed)
    for request in requests:
        ring.submit(request)
    while ring.step_randomly():
        pass
    assert set(ring.ended) == set(ring.requests)
    stats = ring.scheduler.stats()
    return Served(ring.steps, ring.results, ring.most_in_flight, stats.num_preemptions, stats.prefix_cache_hits)


def replay(runner: GpuRunner | StepRunner, steps: Sequence[ExecuteStep], num_ahead: int) -> list[StepExecuted]:
    """Execute given steps, each collected when `num_ahead` have been launched."""
    results, in_flight = [], deque[Any]()
    for step in steps:
        in_flight.append(runner.launch(step))
        if len(in_flight) >= num_ahead:
            results.append(runner.collect(in_flight.popleft()))
    return results + [runner.collect(launched) for launched in in_flight]


def timeless(results: Sequence[StepExecuted]) -> list[StepExecuted]:
    return [msgspec.structs.replace(executed, execute_ns=0) for executed in results]


def streams(results: Sequence[StepExecuted]) -> dict[RequestId, list[int]]:
    """Every request's tokens, those of rows in flight past its end included."""
    found: dict[RequestId, list[int]] = {}
    for executed in results:
        for request_id, token_id in zip(executed.request_ids, executed.token_ids, strict=True):
            found.setdefault(request_id, []).append(token_id)
    return found
