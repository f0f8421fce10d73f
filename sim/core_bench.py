"""How fast the scheduler and allocator cores are: `python -m octavo.sim.core_bench`.

A closed loop keeps a number of requests running; each that ends is replaced. Its messages are recorded, then replayed
several times into fresh cores, which decide the same each time; a message's cost is the least of its replays. So
neither the stand-in for the executor nor other work on the machine counts, and every message of the workload does.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from ..actors.kv_allocator.core import AllocatorConfig, AllocatorInbox, KVAllocatorCore
from ..actors.scheduler.core import SchedulerConfig, SchedulerCore, SchedulerInbox
from ..messages.ids import RequestId
from ..messages.kv import BlocksFreed, PrefixMatched
from ..messages.request import RequestEnded, SubmitRequest
from ..messages.sampling import SamplingParams
from ..messages.step import ExecuteStep, PlanDue, StepExecuted
from ..messages.system import ExecutorFailed

_PLAN_DUE = PlanDue()
_BLOCK_SIZE = 16


class CoreTimes(msgspec.Struct, frozen=True):
    """What was measured for one number of running requests.

    Attributes:
        num_running: requests kept running.
        context_len: tokens of their prompts, no two alike.
        num_steps: steps measured.
        rows_per_step: mean.
        scheduler_us, allocator_us: per step.
    """

    num_running: int
    context_len: int
    num_steps: int
    rows_per_step: float
    scheduler_us: float
    allocator_us: float

    @property
    def steps_per_s(self) -> float:
        """Steps of both cores together in a second of one CPU core."""
        return 1e6 / (self.scheduler_us + self.allocator_us)


class _InstantExecutor:
    """Answers each step at once; knows only which rows sample."""

    def __init__(self) -> None:
        self._left: dict[RequestId, int] = {}  # known tokens not computed

    def execute(self, step: ExecuteStep) -> StepExecuted:
        left = self._left
        for request_id in step.drop:
            del left[request_id]
        for start in step.start:
            left[start.request_id] = len(start.token_ids) // 4 - start.num_computed_tokens
        sampled = []
        for request_id, num_tokens in zip(step.request_ids, step.num_tokens, strict=True):
            left[request_id] -= num_tokens
            if left[request_id] == 0:
                left[request_id] = 1
                sampled.append(request_id)
        return StepExecuted(step.epoch, step.step_id, tuple(sampled), (7,) * len(sampled))


class _RecordedLoop:
    """The two cores, an instant executor, and everything the cores heard."""

    def __init__(self, config: SchedulerConfig, context_len: int, output_len: int) -> None:
        self._scheduler = make_scheduler(config)
        self._allocator = make_allocator(config)
        self._executor = _InstantExecutor()
        self._rng = random.Random(0)  # noqa: S311 (a workload, not a secret)
        self._context_len = context_len
        self._output_len = output_len
        self._next_id = 0
        self._num_to_submit = config.max_num_seqs
        self._to_allocator: deque[AllocatorInbox] = deque()
        self._steps: deque[ExecuteStep] = deque()
        self.heard_by_scheduler: list[SchedulerInbox] = []
        self.heard_by_allocator: list[AllocatorInbox] = []
        self.num_rows = 0

    def _submit(self) -> None:
        prompt = array("i", self._rng.randbytes(4 * self._context_len))
        # Lengths differ, so that ends are spread over the steps.
        max_tokens = self._rng.randint(self._output_len // 2, self._output_len * 3 // 2)
        self._tell_scheduler(
            SubmitRequest(RequestId(self._next_id), prompt.tobytes(), SamplingParams(max_tokens=max_tokens, seed=1))
        )
        self._next_id += 1

    def _tell_scheduler(self, message: SchedulerInbox) -> None:
        self.heard_by_scheduler.append(message)
        for answer in self._scheduler.handle(message, 1):
            if isinstance(answer, RequestEnded):
                self._num_to_submit += 1
            elif answer is not message:
                assert not isinstance(answer, StepExecuted | ExecutorFailed), answer
                self._to_allocator.append(answer)

    def _settle(self) -> None:
        """Carry messages between the cores until neither has more to say."""
        while True:
            self._tell_scheduler(_PLAN_DUE)
            if not self._to_allocator:
                return
            while self._to_allocator:
                message = self._to_allocator.popleft()
                self.heard_by_allocator.append(message)
                for answer in self._allocator.handle(message, 1):
                    if isinstance(answer, ExecuteStep):
                        self._steps.append(answer)
                    else:
                        assert isinstance(answer, PrefixMatched | BlocksFreed)
                        self._tell_scheduler(answer)

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            while self._num_to_submit:
                self._num_to_submit -= 1
                self._submit()
            self._settle()
            step = self._steps.popleft()
            self.num_rows += len(step.request_ids)
            self._tell_scheduler(self._executor.execute(step))


def make_scheduler(config: SchedulerConfig) -> SchedulerCore:
    """Return a fresh scheduler core."""
    return SchedulerCore(config)


def make_allocator(config: SchedulerConfig) -> KVAllocatorCore:
    """Return the allocator core that goes with a scheduler's configuration."""
    return KVAllocatorCore(AllocatorConfig(num_blocks=config.num_blocks, block_size=config.block_size))


def _least_ns(
    make_handle: Callable[[], Callable[..., object]], heard: Sequence[object], begin: int, num_replays: int
) -> int:
    """Replay messages into fresh cores; return the sum of each one's least time from the `begin`th on."""
    least = [1 << 62] * len(heard)
    clock = time.perf_counter_ns
    for _ in range(num_replays):
        handle = make_handle()
        for i, message in enumerate(heard):
            before = clock()
            handle(message, 1)
            elapsed = clock() - before
            least[i] = min(least[i], elapsed)
    return sum(least[begin:])


def measure(
    num_running: int, *, context_len: int = 512, output_len: int = 256, num_steps: int = 500, num_replays: int = 5
) -> CoreTimes:
    """Time both cores in a steady state of `num_running` requests."""
    config = SchedulerConfig(
        num_blocks=(num_running + 8) * (context_len + 2 * output_len) // _BLOCK_SIZE,
        block_size=_BLOCK_SIZE,
        max_model_len=1 << 20,
        max_num_seqs=num_running,
    )
    loop = _RecordedLoop(config, context_len, output_len)
    # Past the burst of first prompts, and until the pool is used up: every new block evicts a cached one.
    loop.run(-(-num_running * context_len // config.max_num_batched_tokens) + 2 * output_len)
    begin_scheduler, begin_allocator = len(loop.heard_by_scheduler), len(loop.heard_by_allocator)
    loop.num_rows = 0
    loop.run(num_steps)
    # As a server does once it is warm: the collector would go through the recording again and again.
    gc.collect()
    gc.freeze()
    try:
        scheduler_ns = _least_ns(
            lambda: make_scheduler(config).handle, loop.heard_by_scheduler, begin_scheduler, num_replays
        )
        allocator_ns = _least_ns(
            lambda: make_allocator(config).handle, loop.heard_by_allocator, begin_allocator, num_replays
        )
    finally:
        gc.unfreeze()
    return CoreTimes(
        num_running=num_running,
        context_len=context_len,
        num_steps=num_steps,
        rows_per_step=loop.num_rows / num_steps,
        scheduler_us=scheduler_ns / num_steps / 1e3,
        allocator_us=allocator_ns / num_steps / 1e3,
    )


def main(argv: list[str] | None = None) -> int:
    """Print one line for each number of running requests."""
    parser = argparse.ArgumentParser(prog="python -m octavo.sim.core_bench", description=__doc__)
    parser.add_argument("--num-running", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--context-len", type=int, nargs="+", default=[512], help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=256, help="mean tokens of each answer")
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--num-replays", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args(argv)
    if not args.json:
        print("running  prompt  rows/step  scheduler us/step  allocator us/step  core steps/s")
    for context_len in args.context_len:
        for num_running in args.num_running:
            times = measure(
                num_running,
                context_len=context_len,
                output_len=args.output_len,
                num_steps=args.num_steps,
                num_replays=args.num_replays,
            )
            if args.json:
                fields = {**msgspec.structs.asdict(times), "steps_per_s": times.steps_per_s}
                print(msgspec.json.encode(fields).decode())
            else:
                print(
                    f"{times.num_running:7d} {times.context_len:7d} {times.rows_per_step:10.1f}"
                    f" {times.scheduler_us:18.1f} {times.allocator_us:18.1f} {times.steps_per_s:13,.0f}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
