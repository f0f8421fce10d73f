"""What a step costs the host, and whether the device has to wait: `python -m octavo.actors.executor.gpu.bench_host`.

Scheduler, KV allocator and GPU runner do for each step what they do when they serve; in the device's place stands a
timeline: a step takes a given time, and more for each of its prompts' tokens, begins when it is launched and the one
before has ended, and samples token 0. So host time is what one thread spends on all of it (the executor has a process
of its own when serving), without the calls into CUDA: launches are counted (two copies, an event and a graph, or
where there is no graph fourteen kernels a layer), and each is charged a given time, in which the host can do nothing
else and the device is fed. Time is the thread's CPU time.

"Come and go" are requests of 100 to 1,000 tokens of prompt and of output. "In chunks" are the same with 256 tokens of
prompts beside 256 decodes, so that nearly every step has some: launched kernel by kernel, and from graphs.
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
from ...runtime.percentile import percentile
from ...scheduler.config import SchedulerConfig
from ...scheduler.core import SchedulerCore
from ..launch_ahead import LaunchAhead
from .counted_forward import CountedForward, Launches
from .mixed_sizes import MOST_CHUNKS
from .runner import GpuRunner
from .stream import Completion

_VOCAB_SIZE = 151_936
_BLOCK_SIZE = 16
_NUM_AHEAD = 16  # requests that are ready before they are needed
_STAGES = ("collect", "schedule", "place", "launch")
_DEVICE_CALLS = ("launches mean", "launching p50", "p50 with launching")
_MOST_TOKENS = 8192
_CHUNK_TOKENS = 256  # of prompts in a step
_GRAPH_TOKENS = (64, 128, 256, 384, 512)


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
    """A device that takes some time for a step, and works on one at a time, in order, as fast as it is launched.

    Args:
        step_ns: of every step; `token_ns` more for each of its prompts' tokens.
        launch_ns: of the host, for each launch.
        launches: that the submitted work counts.

    Attributes:
        idle_ns: how long it had nothing to do, between steps and between their launches, since the last `restart`.
        busy_ns: how long it worked.
        waited_ns: how long the host waited for it.
        charged_ns: how long the host was launching, with what its work did between launches.
        num_launches: of each step.
    """

    def __init__(
        self, clock: Clock, step_ns: int, *, token_ns: int = 0, launch_ns: int = 0, launches: Launches | None = None
    ) -> None:
        self._clock, self._step_ns, self._token_ns, self._launch_ns = clock, step_ns, token_ns, launch_ns
        self._launches = launches or Launches()
        self._free_at_ns = 0
        self.restart()

    def restart(self) -> None:
        """Count anew."""
        self.idle_ns = self.busy_ns = self.waited_ns = self.charged_ns = 0
        self.num_launches: list[int] = []

    def submit(self, work: Callable[[], None]) -> Completion:
        began_ns, launches = self._clock.now_ns(), self._launches
        num_launches, num_tokens = launches.count, launches.chunk_tokens
        work()
        num_launches, num_tokens = launches.count - num_launches, launches.chunk_tokens - num_tokens
        if num_launches and self._launch_ns:
            self._clock.wait_until(self._clock.now_ns() + num_launches * self._launch_ns)
        launched_ns = self._clock.now_ns()
        self.charged_ns += launched_ns - began_ns
        self.num_launches.append(num_launches)
        step_ns = self._step_ns + num_tokens * self._token_ns
        ready_ns = max(began_ns, self._free_at_ns)
        ended_ns = max(ready_ns + step_ns, launched_ns)
        if self._free_at_ns:
            self.idle_ns += ended_ns - self._free_at_ns - step_ns
        self._free_at_ns = ended_ns
        self.busy_ns += step_ns
        return _StepEnd(self, self._clock, ended_ns)


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
    """Nanoseconds of each step, by stage, and the device's side of it.

    Attributes:
        launching: what device calls took the host in each step, with the work between them; in none of the stages.
        idle_share: of the device's time.
        launches: of a step, in the mean.
    """

    stages: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in _STAGES})
    launching: list[int] = field(default_factory=list)
    idle_share: float = 0.0
    launches: float = 0.0
    num_sampled: int = 0
    num_ended: int = 0

    def of_steps(self) -> list[int]:
        """The host's time of each step, all stages together."""
        return [sum(times) for times in zip(*self.stages.values(), strict=True)]

    def with_launching(self) -> list[int]:
        """The same with its device calls."""
        return [sum(times) for times in zip(*self.stages.values(), self.launching, strict=True)]


class HostLoop:
    """Scheduler, allocator and runner on one thread, and a stand-in for the device.

    Args:
        num_running: requests that run all the time; one that ends is followed by another.
        output_tokens: least and most tokens of a request's output.
        step_ns: what a step takes the device, `token_ns` more for each of its prompts' tokens.
        clock: of host and device.
        chunk_tokens: of prompts in one step, at most.
        graph_tokens: of steps with chunks that are captured.
        launch_ns: what a launch takes the host.
        launches: of the model.
    """

    def __init__(
        self,
        *,
        num_running: int,
        output_tokens: tuple[int, int],
        step_ns: int,
        clock: Clock,
        token_ns: int = 0,
        chunk_tokens: int = _MOST_TOKENS,
        graph_tokens: tuple[int, ...] = (),
        launch_ns: int = 0,
        launches: Launches | None = None,
        seed: int = 0,
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
                max_num_batched_tokens=min(_MOST_TOKENS, num_running + chunk_tokens),
            )
        )
        self._allocator = KVAllocatorCore(AllocatorConfig(num_blocks=num_blocks, block_size=_BLOCK_SIZE))
        launches = launches or Launches()
        self._timeline = Timeline(clock, step_ns, token_ns=token_ns, launch_ns=launch_ns, launches=launches)
        self._runner = GpuRunner(
            _no_device(max_model_len, num_blocks),
            max_num_seqs=num_running,
            max_num_batched_tokens=_MOST_TOKENS,
            pipeline_depth=2,
            block_size=_BLOCK_SIZE,
            graph_sizes=(num_running,),
            graph_tokens=graph_tokens,
            stream=self._timeline,
            forward=CountedForward(launches, num_running + MOST_CHUNKS),
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
        for times in (*measured.stages.values(), measured.launching):
            del times[: len(times) - num_steps]
        measured.idle_share = timeline.idle_ns / (timeline.idle_ns + timeline.busy_ns)
        measured.launches = sum(timeline.num_launches) / len(timeline.num_launches)
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
        inbox: deque[Any] = deque(results)
        is_due = True  # whether to plan once the inbox is drained
        while inbox or is_due:
            message = inbox.popleft() if inbox else PlanDue()
            is_due = type(message) is not PlanDue
            for answer in self._scheduler.handle(message, started_ns):
                if isinstance(answer, RequestEnded):
                    measured.num_ended += 1
                    self._submit()
                elif not isinstance(answer, StepExecuted | ExecutorFailed):  # results go on to the detokenizer
                    before_ns = now_ns()
                    placed = self._allocator.handle(answer, before_ns)
                    place_ns += now_ns() - before_ns
                    self._steps.extend(each for each in placed if isinstance(each, ExecuteStep))
                    inbox.extend(each for each in placed if not isinstance(each, ExecuteStep))
        measured.stages["schedule"].append(now_ns() - started_ns - place_ns)
        measured.stages["place"].append(place_ns)

    def _launch(self, measured: Measured) -> None:
        started_ns, charged_ns = self._clock.now_ns(), self._timeline.charged_ns
        self._ahead.launch(self._steps.popleft())
        charged_ns = self._timeline.charged_ns - charged_ns
        measured.stages["launch"].append(self._clock.now_ns() - started_ns - charged_ns)
        measured.launching.append(charged_ns)

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
    group = SimpleNamespace(world_size=1)
    return SimpleNamespace(model=model, plan=plan, group=group, kv_caches=[], reset=lambda: None)


def scenarios(num_steps: int) -> dict[str, dict[str, Any]]:
    """What runs, by name."""
    come_and_go = {"output_tokens": (100, 1000), "graph_tokens": _GRAPH_TOKENS}
    return {
        "stay": {"output_tokens": (num_steps + 1000,) * 2},
        "come and go": come_and_go,
        "in chunks, launched": {**come_and_go, "chunk_tokens": _CHUNK_TOKENS, "graph_tokens": ()},
        "in chunks, graphs": {**come_and_go, "chunk_tokens": _CHUNK_TOKENS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256], help="requests that run")
    parser.add_argument("--steps", type=int, default=1500, help="steps measured")
    parser.add_argument("--step-us", type=float, default=2000.0, help="what a step takes the device")
    parser.add_argument("--token-us", type=float, default=1.5, help="what a prompt's token takes it, besides")
    parser.add_argument("--launch-us", type=float, default=5.0, help="what a launch takes the host")
    parser.add_argument("--layers", type=int, default=28, help="of the model that is launched")
    parser.add_argument("--only", nargs="+", choices=list(scenarios(0)), help="these scenarios")
    arguments = parser.parse_args()
    table = Table(
        title=f"host time of a step, us: device calls are in the columns of launching alone, as an assumed "
        f"{arguments.launch_us:g} for each launch; the device takes {arguments.step_us:g}, and {arguments.token_us:g} "
        "for a prompt's token"
    )
    for name in (
        "rows",
        "requests",
        "p50",
        "p99",
        *(f"{stage} p50" for stage in _STAGES),
        *_DEVICE_CALLS,
        "device idle",
    ):
        table.add_column(name, justify="right")
    gc.collect()
    gc.freeze()  # as every process does that serves
    for num_running in arguments.rows:
        for name, options in scenarios(arguments.steps).items():
            if arguments.only and name not in arguments.only:
                continue
            loop = HostLoop(
                num_running=num_running,
                step_ns=int(arguments.step_us * 1000),
                token_ns=int(arguments.token_us * 1000),
                launch_ns=int(arguments.launch_us * 1000),
                launches=Launches(num_layers=arguments.layers),
                clock=HostClock(),
                **options,
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
                f"{measured.launches:.0f}",
                f"{percentile(measured.launching, 0.5) / 1000:.0f}",
                f"{percentile(measured.with_launching(), 0.5) / 1000:.0f}",
                f"{measured.idle_share:.2%}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
