"""How fast the scheduler and allocator cores are: `python -m octavo.sim.core_bench`.

A closed loop keeps a number of requests running; each that ends is replaced. The executor answers at once and is not
counted: only time inside the two cores' `handle` is. What is printed is the median over chunks of 50 steps, so that
another process that takes the CPU now and then does not count either.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from array import array
from collections import deque

import msgspec

from ..actors.kv_allocator.core import AllocatorConfig, AllocatorInbox, KVAllocatorCore
from ..actors.scheduler.core import SchedulerConfig, SchedulerCore, SchedulerInbox
from ..messages.ids import RequestId
from ..messages.kv import BlocksFreed, PrefixMatched
from ..messages.request import RequestEnded, SubmitRequest
from ..messages.sampling import SamplingParams
from ..messages.step import ExecuteStep, PlanDue, StepExecuted

_PLAN_DUE = PlanDue()
_CHUNK = 50


class CoreTimes(msgspec.Struct, frozen=True):
    """Result of one round.

    Attributes:
        num_running: requests kept running.
        context_len: tokens of their prompts.
        num_steps: steps measured.
        scheduler_us, allocator_us: per step.
        rows_per_step: mean.
    """

    num_running: int
    context_len: int
    num_steps: int
    scheduler_us: float
    allocator_us: float
    rows_per_step: float

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


class _Loop:
    def __init__(self, num_running: int, context_len: int, output_len: int, seed: int) -> None:
        block_size = 16
        num_blocks = (num_running + 8) * (context_len + 2 * output_len) // block_size
        config = SchedulerConfig(
            num_blocks=num_blocks, block_size=block_size, max_model_len=1 << 20, max_num_seqs=num_running
        )
        self.scheduler = SchedulerCore(config)
        self.allocator = KVAllocatorCore(AllocatorConfig(num_blocks=num_blocks, block_size=block_size))
        self.executor = _InstantExecutor()
        self.rng = random.Random(seed)  # noqa: S311 (a workload, not a secret)
        self.context_len = context_len
        self.output_len = output_len
        self.next_id = 0
        self.num_ended = 0
        self.num_rows = 0
        self.scheduler_ns = 0
        self.allocator_ns = 0
        self.to_allocator: deque[AllocatorInbox] = deque()
        self.steps: deque[ExecuteStep] = deque()

    def submit(self) -> None:
        rng = self.rng
        prompt = array("i", [rng.randrange(100_000) for _ in range(self.context_len)])
        max_tokens = rng.randrange(self.output_len // 2, self.output_len * 3 // 2)
        self.tell_scheduler(
            SubmitRequest(RequestId(self.next_id), prompt.tobytes(), SamplingParams(max_tokens=max_tokens, seed=1))
        )
        self.next_id += 1

    def tell_scheduler(self, message: SchedulerInbox) -> None:
        begin = time.perf_counter_ns()
        answers = self.scheduler.handle(message, 1)
        self.scheduler_ns += time.perf_counter_ns() - begin
        for answer in answers:
            if isinstance(answer, RequestEnded):
                self.num_ended += 1
            else:
                self.to_allocator.append(answer)

    def settle(self) -> None:
        """Carry messages between the cores until neither has more to say."""
        while True:
            self.tell_scheduler(_PLAN_DUE)
            if not self.to_allocator:
                return
            while self.to_allocator:
                message = self.to_allocator.popleft()
                begin = time.perf_counter_ns()
                answers = self.allocator.handle(message, 1)
                self.allocator_ns += time.perf_counter_ns() - begin
                for answer in answers:
                    if isinstance(answer, ExecuteStep):
                        self.steps.append(answer)
                    else:
                        assert isinstance(answer, PrefixMatched | BlocksFreed)
                        self.tell_scheduler(answer)

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.settle()
            step = self.steps.popleft()
            self.num_rows += len(step.request_ids)
            self.tell_scheduler(self.executor.execute(step))
            while self.num_ended:
                self.num_ended -= 1
                self.submit()


def measure(num_running: int, *, context_len: int, output_len: int, num_steps: int, seed: int = 0) -> CoreTimes:
    """Time both cores in a steady state of `num_running` requests."""
    loop = _Loop(num_running, context_len, output_len, seed)
    for _ in range(num_running):
        loop.submit()
    # Past the burst of prompts, until requests end at different times.
    loop.run(-(-num_running * context_len // 2048) + output_len)
    loop.num_rows = 0
    chunks: list[tuple[int, int]] = []
    for _ in range(max(1, num_steps // _CHUNK)):
        loop.scheduler_ns = loop.allocator_ns = 0
        loop.run(_CHUNK)
        chunks.append((loop.scheduler_ns, loop.allocator_ns))
    scheduler_ns, allocator_ns = sorted(chunks, key=sum)[len(chunks) // 2]
    return CoreTimes(
        num_running=num_running,
        context_len=context_len,
        num_steps=len(chunks) * _CHUNK,
        scheduler_us=scheduler_ns / _CHUNK / 1e3,
        allocator_us=allocator_ns / _CHUNK / 1e3,
        rows_per_step=loop.num_rows / len(chunks) / _CHUNK,
    )


def main(argv: list[str] | None = None) -> int:
    """Print one line for each number of running requests."""
    parser = argparse.ArgumentParser(prog="python -m octavo.sim.core_bench", description=__doc__)
    parser.add_argument("--num-running", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--context-len", type=int, nargs="+", default=[512], help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=256, help="mean tokens of each answer")
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--num-rounds", type=int, default=3, help="the best median is printed")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args(argv)
    if not args.json:
        print("running  prompt  rows/step  scheduler us/step  allocator us/step  core steps/s")
    for context_len in args.context_len:
        for num_running in args.num_running:
            best = max(
                (
                    measure(
                        num_running,
                        context_len=context_len,
                        output_len=args.output_len,
                        num_steps=args.num_steps,
                        seed=seed,
                    )
                    for seed in range(args.num_rounds)
                ),
                key=lambda times: times.steps_per_s,
            )
            if args.json:
                print(msgspec.json.encode({**msgspec.structs.asdict(best), "steps_per_s": best.steps_per_s}).decode())
            else:
                print(
                    f"{best.num_running:7d} {best.context_len:7d} {best.rows_per_step:10.1f} {best.scheduler_us:18.1f}"
                    f" {best.allocator_us:18.1f} {best.steps_per_s:13,.0f}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
