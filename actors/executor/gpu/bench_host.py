"""What a step costs the host, and whether the device has to wait: `python -m octavo.actors.executor.gpu.bench_host`.

Scheduler, KV allocator and GPU runner do for each step what they do when they serve; in the device's place stands a
timeline: a step takes a given time, begins when it is launched and the one before has ended, and samples token 0. So
host time is what one thread spends on all of it (the executor has a process of its own when serving), without the calls
into CUDA that a launch makes: two copies, two or three kernels or a graph, an event. Time is the thread's CPU time.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from ....messages.ids import RequestId
from ....messages.request import RequestEnded, SubmitRequest
from ....messages.sampling import SamplingParams
from ....messages.step import ExecuteStep, PlanDue, StepExecuted
from ....messages.system import ExecutorFailed
from ...kv_allocator.config import AllocatorConfig
from ...kv_allocator.core import KVAllocatorCore
from ...scheduler.config import SchedulerConfig
from ...scheduler.core import SchedulerCore
from ..launch_ahead import LaunchAhead
from .runner import GpuRunner
from .stream import Completion

_VOCAB_SIZE = 151_936
_BLOCK_SIZE = 16
_NUM_AHEAD = 16  # requests that are ready before they are needed
_STAGES = ("collect", "schedule", "place", "launch")


class Clock(Protocol):
    def now_ns(self) -> int: ...

    def wait_until(self, at_ns: int) -> None: ...


class HostClock:
    """This thread's CPU time, so that nothing else that the machine does counts; it waits by being busy."""

    def now_ns(self) -> int:
        return time.thread_time_ns()

    def wait_until(self, at_ns: int) -> None:
        while time.thread_time_ns() < at_ns:
            pass


class Timeline:
    """A device that takes `step_ns` for a step, and works on one at a time, in order.

    Attributes:
        idle_ns: how long it had nothing to do between steps, since the last `restart`.
        busy_ns: how long it worked.
        waited_ns: how long the host waited for it.
    """

    def __init__(self, clock: Clock, step_ns: int) -> None:
        self._clock, self._step_ns = clock, step_ns
        self._free_at_ns = 0
        self.idle_ns = self.busy_ns = self.waited_ns = 0

    def restart(self) -> None:
        """Count anew."""
        self.idle_ns = self.busy_ns = self.waited_ns = 0

    def submit(self, _work: Callable[[], None]) -> Completion:
        now_ns = self._clock.now_ns()
        if self._free_at_ns:
            self.idle_ns += max(0, now_ns - self._free_at_ns)
        self._free_at_ns = max(now_ns, self._free_at_ns) + self._step_ns
        self.busy_ns += self._step_ns
        return _StepEnd(self, self._clock, self._free_at_ns)


@dataclass(frozen=True, slots=True)
class _StepEnd:
    timeline: Timeline
    clock: Clock
    at_ns: int

    def is_done(self) -> bool:
        return self.clock.now_ns() >= self.at_ns

    def wait(self) -> None:
        before_ns = self.clock.now_ns()
        if before_ns < self.at_ns:
            self.clock.wait_until(self.at_ns)
            self.timeline.waited_ns += self.clock.now_ns() - before_ns


@dataclass(slots=True)
class Measured:
    """Nanoseconds of each step, by stage, and the device's side of it."""

    stages: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in _STAGES})
    idle_share: float = 0.0
    num_sampled: int = 0
    num_ended: int = 0

    def of_steps(self) -> list[int]:
        """The host's time of each step, all stages together."""
        return [sum(times) for times in zip(*self.stages.values(), strict=True)]


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


class HostLoop:
    """Scheduler, allocator and runner on one thread, and a stand-in for the device.

    Args:
        num_running: requests that run all the time; one that ends is followed by another.
        output_tokens: least and most tokens of a request's output.
        step_ns: what a step takes the device.
        clock: of host and device.
    """

    def __init__(
        self, *, num_running: int, output_tokens: tuple[int, int], step_ns: int, clock: Clock, seed: int = 0
    ) -> None:
        self._clock = clock
        self._chance = random.Random(seed)  # noqa: S311  # a workload, not a secret
        self._tokens = array("i", (self._chance.randrange(_VOCAB_SIZE) for _ in range(100_000)))
        self._output_tokens = output_tokens
        max_model_len = 1024 + output_tokens[1]
        num_blocks = num_running * (-(-max_model_len // _BLOCK_SIZE) + 1)
        self._scheduler = SchedulerCore(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_size=_BLOCK_SIZE,
                max_model_len=max_model_len,
                max_num_seqs=num_running,
                max_num_batched_tokens=8192,
            )
        )
        self._allocator = KVAllocatorCore(AllocatorConfig(num_blocks=num_blocks, block_size=_BLOCK_SIZE))
        self._timeline = Timeline(clock, step_ns)
        self._runner = GpuRunner(
            _no_device(max_model_len, num_blocks),
            max_num_seqs=num_running,
            max_num_batched_tokens=8192,
            pipeline_depth=2,
            block_size=_BLOCK_SIZE,
            graph_sizes=(num_running,),
            stream=self._timeline,
        )
        self._ahead = LaunchAhead(self._runner)
        self._steps: deque[ExecuteStep] = deque()
        self._next_id = 0
        self._to_come: deque[SubmitRequest] = deque()
        for _ in range(num_running):
            self._submit()
        self._plan(Measured())

    def run(self, num_steps: int) -> Measured:
        """Execute so many steps, and measure them."""
        measured, timeline = Measured(), self._timeline
        timeline.restart()
        while len(measured.stages["collect"]) < num_steps:
            if self._ahead.is_due(has_step=bool(self._steps)):
                self._collect(measured)
            elif self._steps:
                self._launch(measured)
            while len(self._to_come) < _NUM_AHEAD:  # clients' work, in nobody's time
                self._to_come.append(self._make_request())
        # What was planned and launched before belongs to the steps before: as many entries of each stage.
        for times in measured.stages.values():
            del times[: len(times) - num_steps]
        measured.idle_share = timeline.idle_ns / (timeline.idle_ns + timeline.busy_ns)
        return measured

    def _collect(self, measured: Measured) -> None:
        started_ns, waited_ns = self._clock.now_ns(), self._timeline.waited_ns
        executed = self._ahead.collect()
        spent_ns = self._clock.now_ns() - started_ns - (self._timeline.waited_ns - waited_ns)
        measured.stages["collect"].append(spent_ns)
        measured.num_sampled += len(executed.token_ids)
        self._plan(measured, executed)

    def _plan(self, measured: Measured, *results: StepExecuted) -> None:
        """Take results in and plan what the pipeline has room for."""
        # The clock is looked at once a message when serving too, but at one that costs a twentieth of this one.
        now_ns, place_ns, started_ns = self._clock.now_ns, 0, self._clock.now_ns()
        inbox: deque[Any] = deque((*results, PlanDue()))
        while inbox:
            message = inbox.popleft()
            for answer in self._scheduler.handle(message, started_ns):
                if isinstance(answer, RequestEnded):
                    measured.num_ended += 1
                    self._submit()
                elif not isinstance(answer, StepExecuted | ExecutorFailed):  # results go on to the detokenizer
                    before_ns = now_ns()
                    placed = self._allocator.handle(answer, before_ns)
                    place_ns += now_ns() - before_ns
                    self._steps.extend(each for each in placed if isinstance(each, ExecuteStep))
                    heard = [each for each in placed if not isinstance(each, ExecuteStep)]
                    if heard:  # and what it hears of, it may plan with
                        inbox.extend((*heard, PlanDue()))
        measured.stages["schedule"].append(now_ns() - started_ns - place_ns)
        measured.stages["place"].append(place_ns)

    def _launch(self, measured: Measured) -> None:
        started_ns = self._clock.now_ns()
        self._ahead.launch(self._steps.popleft())
        measured.stages["launch"].append(self._clock.now_ns() - started_ns)

    def _submit(self) -> None:
        request = self._to_come.popleft() if self._to_come else self._make_request()
        answers = self._scheduler.handle(request, self._clock.now_ns())
        assert not answers, "a request that has room is answered by its tokens alone"

    def _make_request(self) -> SubmitRequest:
        chance = self._chance
        begin = chance.randrange(len(self._tokens) - 1000)
        prompt = self._tokens[begin : begin + chance.randint(100, 1000)]
        params = SamplingParams(
            temperature=0.6, seed=self._next_id, max_tokens=chance.randint(*self._output_tokens), ignore_eos=True
        )
        request = SubmitRequest(RequestId(self._next_id), prompt.tobytes(), params)
        self._next_id += 1
        return request


def _no_device(max_model_len: int, num_blocks: int) -> Any:
    """What the runner asks of a `Device`, without a model: the timeline does no work."""
    model = SimpleNamespace(vocab_size=_VOCAB_SIZE, device=torch.device("cpu"))
    plan = SimpleNamespace(max_model_len=max_model_len, num_blocks=num_blocks)
    return SimpleNamespace(model=model, plan=plan, kv_caches=[], reset=lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256], help="requests that run")
    parser.add_argument("--steps", type=int, default=1500, help="steps measured")
    parser.add_argument("--step-us", type=float, default=2000.0, help="what a step takes the device")
    arguments = parser.parse_args()
    table = Table(title=f"host time of a step, us; the device takes {arguments.step_us:g}")
    for name in ("rows", "requests", "p50", "p99", *(f"{stage} p50" for stage in _STAGES), "device idle"):
        table.add_column(name, justify="right")
    gc.collect()
    gc.freeze()  # as every process does that serves
    for num_running in arguments.rows:
        for name, output_tokens in (("stay", (arguments.steps + 1000,) * 2), ("come and go", (100, 1000))):
            loop = HostLoop(
                num_running=num_running,
                output_tokens=output_tokens,
                step_ns=int(arguments.step_us * 1000),
                clock=HostClock(),
            )
            loop.run(200)  # prompts
            measured = loop.run(arguments.steps)
            steps = measured.of_steps()
            table.add_row(
                str(num_running),
                name,
                f"{percentile(steps, 0.5) / 1000:.0f}",
                f"{percentile(steps, 0.99) / 1000:.0f}",
                *(f"{percentile(measured.stages[stage], 0.5) / 1000:.0f}" for stage in _STAGES),
                f"{measured.idle_share:.2%}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
