"""`python -m octavo.actors.runtime.bench_port`: what a link between processes costs, and what it costs the device.

Four measurements, each over `ipc://`, with the messages of a step of 256 decoding requests:

- CPU time of encoding, of decoding, and of a send and a receive by themselves. A batch that decodes brings the same
  requests step after step, and what repeats is not decoded again (`standing_columns`); `first` is what it costs when
  nothing repeats;
- the hop: half a round trip of `ExecuteStep` one way and `StepExecuted` back, between a process with an event loop and
  a blocking one, one message in flight, both messages made beforehand;
- how long an executor idles between steps of a stand-in device that takes a fixed time for each, with the real
  scheduler and allocator cores in the other process and two steps in flight. The executor's loop is that of
  `executor/process.py`, around two devices: one with a queue, as a GPU has, for which the next step is launched before
  the last is collected, and one that computes on the executor's own thread, as a CPU does, and takes one at a time;
- how much longer a step of the first of these takes while an edge sends all that it is let, for ever: messages that the
  engine has nothing to do for, small ones and ones of 5 KB. Rounds with and without it take turns; the ratio is of the
  means.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from ...messages.base import Message
from ...messages.ids import BlockId, Epoch, RequestId, StepId
from ...messages.processes import RememberQuarantined
from ...messages.request import CancelRequest
from ...messages.step import ExecuteStep, PlanDue, StepExecuted
from ..executor.launch_ahead import LaunchAhead
from .asyncio_port import attach
from .bench_ring import BLOCK_SIZE, Ring
from .logs import configure_logs
from .percentile import percentile
from .port import Port
from .port_limits import EDGE_LIMITS
from .wire import Decoder, Encoder

_FLOOD_ROUNDS = 4
_FLOOD_QUEUE = 4096
_WARM_UP_STEPS = 20

HOP_BAR_US = 150.0
IDLE_BAR_US = 120.0
FLOOD_BAR = 1.1

Part = Literal["queue", "blocking"]
PARTS: tuple[Part, ...] = ("queue", "blocking")
"""How the stand-in device takes its steps."""


def decode_step(num_rows: int, step: int = 1000) -> ExecuteStep:
    """A step in which every request decodes a token, and a sixteenth of them needs a block."""
    ids = tuple(RequestId(10_000 + row) for row in range(num_rows))
    grow = tuple((request_id, (BlockId(50_000 + request_id),)) for request_id in ids[::BLOCK_SIZE])
    return ExecuteStep(Epoch(0), StepId(step), ids, (1,) * num_rows, append_blocks=grow)


def executed(step: ExecuteStep, execute_ns: int = 6_000_000) -> StepExecuted:
    """Its answer."""
    tokens = tuple(300 + row * 97 % 30_000 for row in range(len(step.request_ids)))
    return StepExecuted(step.epoch, step.step_id, step.request_ids, tokens, execute_ns=execute_ns)


def cpu_us(call: Callable[[], object], num_calls: int = 2000) -> float:
    """CPU microseconds of a call, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        started = time.process_time_ns()
        for _ in range(num_calls):
            call()
        best = min(best, (time.process_time_ns() - started) / num_calls / 1000)
    return best


def measure_codec(num_rows: int) -> dict[str, float]:
    """CPU time of encoding and decoding, in microseconds, and bytes."""
    encoder, decoder = Encoder(), Decoder([ExecuteStep, StepExecuted])
    figures = {}
    for name, message in (("ExecuteStep", decode_step(num_rows)), ("StepExecuted", executed(decode_step(num_rows)))):
        body, _ = encoder.encode(message)
        figures[f"{name} bytes"] = float(len(body))
        figures[f"{name} encode us"] = cpu_us(lambda message=message: encoder.encode(message))  # type: ignore[misc]
        figures[f"{name} decode us"] = cpu_us(lambda body=body: decoder.decode(body))  # type: ignore[misc]
        others = [encoder.encode(_of_others(message, by))[0] for by in (0, 1)]
        turns = itertools.cycle(others)
        figures[f"{name} decode first us"] = cpu_us(lambda turns=turns: decoder.decode(next(turns)))  # type: ignore[misc]
    return figures


def _of_others(message: ExecuteStep | StepExecuted, by: int) -> Message:
    """The same message about other requests."""
    ids = tuple(RequestId(request_id + by) for request_id in message.request_ids)
    if isinstance(message, ExecuteStep):
        return msgspec.structs.replace(message, request_ids=ids, num_tokens=(1 + by,) * len(ids))
    return msgspec.structs.replace(message, request_ids=ids)


def measure_port_cpu(num_rows: int, folder: Path) -> dict[str, float]:
    """CPU time of this thread for a send and for a receive (ZeroMQ's own not counted), the best of seven rounds."""
    there = Port("executor 0", 1, allowed={"engine": [ExecuteStep]})
    here = Port("engine", 1, allowed={"executor": [StepExecuted]})
    here.connect("executor 0", 1, there.bind(f"ipc://{folder}/cpu"))
    step = decode_step(num_rows)
    while not here.is_up("executor 0"):
        there.wait(20)
        there.receive()
        here.receive()
    num = 500
    best_send_ns = best_receive_ns = float("inf")
    for _ in range(7):
        send_ns = receive_ns = 0
        for _ in range(num):
            started = time.thread_time_ns()
            here.send("executor 0", step)
            send_ns += time.thread_time_ns() - started
            is_here = False
            while not is_here:
                there.wait(1000)
                started = time.thread_time_ns()
                is_here = bool(there.receive())
                receive_ns += time.thread_time_ns() - started
            here.receive()
        best_send_ns, best_receive_ns = min(best_send_ns, send_ns), min(best_receive_ns, receive_ns)
    here.close()
    there.close()
    return {"send us": best_send_ns / num / 1000, "receive us": best_receive_ns / num / 1000}


async def measure_hop(num_rows: int, num_hops: int, folder: Path) -> dict[str, float]:
    """Half a round trip to a blocking process."""
    loop = asyncio.get_running_loop()
    port = Port("engine", 1, allowed={"executor": [StepExecuted]})
    endpoint = port.bind(f"ipc://{folder}/hop.engine")
    child = _start_child("echo", endpoint, f"ipc://{folder}/hop.executor", 0.0)
    port.connect("executor 0", 1, f"ipc://{folder}/hop.executor")
    step = decode_step(num_rows)
    laps_ns: list[int] = []
    done: asyncio.Future[None] = loop.create_future()
    sent_ns = 0

    def on_messages(messages: list[tuple[str, Message]]) -> None:
        nonlocal sent_ns
        laps_ns.append(time.perf_counter_ns() - sent_ns)
        if len(laps_ns) < num_hops + 200:
            sent_ns = time.perf_counter_ns()
            attached.send("executor 0", step)
        elif not done.done():
            done.set_result(None)

    attached = attach(loop, port, on_messages)
    try:
        sent_ns = time.perf_counter_ns()
        attached.send("executor 0", step)
        await done
    finally:
        attached.close()
        port.close()
        _stop_child(child)
    hops_us = [lap / 2000 for lap in laps_ns[200:]]  # the first ones greet and warm up
    return {"hop p50 us": percentile(hops_us, 0.5), "hop p99 us": percentile(hops_us, 0.99)}


async def measure_idle(part: Part, num_rows: int, num_steps: int, step_ms: float, folder: Path) -> dict[str, float]:
    """How long the stand-in device waits between steps."""
    loop = asyncio.get_running_loop()
    port = Port("engine", 1, allowed={"executor": [StepExecuted]})
    endpoint = port.bind(f"ipc://{folder}/idle.engine")
    child = _start_child(part, endpoint, f"ipc://{folder}/idle.executor", step_ms)
    port.connect("executor 0", 1, f"ipc://{folder}/idle.executor")
    done: asyncio.Future[None] = loop.create_future()
    num_done = 0

    def on_messages(messages: list[tuple[str, Message]]) -> None:
        nonlocal num_done
        for _, message in messages:
            assert isinstance(message, StepExecuted)
            num_done += 1
            ring.hear(message)
        if num_done >= num_steps + 100 and not done.done():
            done.set_result(None)

    attached = attach(loop, port, on_messages)
    ring = Ring(num_rows, num_steps + 2000, lambda step: attached.send("executor 0", step))
    try:
        ring.hear(PlanDue())
        await done
    finally:
        attached.close()
        port.close()
        told = _stop_child(child)
    gaps_us = told["gaps"][100 : 100 + num_steps]
    assert len(gaps_us) >= num_steps - 2, "the stand-in executor says too little"
    figures = {
        f"idle, {part} p50 us": percentile(gaps_us, 0.5),
        f"idle, {part} p90 us": percentile(gaps_us, 0.9),
        f"idle, {part} p99 us": percentile(gaps_us, 0.99),
        f"idle, {part} mean us": statistics.fmean(gaps_us),
    }
    if "cpu" in told:
        figures[f"idle, {part} p50 of CPU us"] = percentile(told["cpu"][100:], 0.5)
    return figures


FLOODS: dict[str, Message] = {
    "small messages": CancelRequest(RequestId(1)),
    "messages of 5 KB": RememberQuarantined(bytes(5000), 1),
}


async def _steps_beside_flood(flood: str, num_rows: int, num_steps: int, step_ms: float, folder: Path) -> list[float]:
    """Milliseconds from each step's results to the next one's, after the flood has begun.

    Args:
        flood: of `FLOODS`; empty: nobody floods.
    """
    loop = asyncio.get_running_loop()
    kinds = [type(message) for message in FLOODS.values()]
    port = Port("engine", 1, allowed={"executor": [StepExecuted], "edge": kinds}, limits_of={"edge": EDGE_LIMITS})
    endpoint = port.bind(f"ipc://{folder}/flood.engine")
    children = [_start_child("queue", endpoint, f"ipc://{folder}/flood.executor", step_ms)]
    if flood:
        children.append(_start_child(flood, endpoint, "", 0.0))
    port.connect("executor 0", 1, f"ipc://{folder}/flood.executor")
    done: asyncio.Future[None] = loop.create_future()
    arrived_ns: list[int] = []
    num_of_flood = 0

    def on_messages(messages: list[tuple[str, Message]]) -> None:
        nonlocal num_of_flood
        heard = [message for _, message in messages if not isinstance(message, RememberQuarantined)]
        num_steps_here = sum(isinstance(message, StepExecuted) for message in heard)
        num_of_flood += len(messages) - num_steps_here
        if num_of_flood or not flood:
            arrived_ns.extend([time.monotonic_ns()] * num_steps_here)
        if heard:
            ring.hear(*heard)
        if len(arrived_ns) > num_steps + _WARM_UP_STEPS and not done.done():
            done.set_result(None)

    attached = attach(loop, port, on_messages)
    ring = Ring(num_rows, num_steps + 20_000, lambda step: attached.send("executor 0", step))
    try:
        ring.hear(PlanDue())
        await done
    finally:
        attached.close()
        port.close()
        for child in children:
            _stop_child(child)
    arrived_ns = arrived_ns[_WARM_UP_STEPS:]
    return [(later - sooner) / 1e6 for sooner, later in itertools.pairwise(arrived_ns)]


async def measure_flood(num_rows: int, num_steps: int, step_ms: float, folder: Path) -> dict[str, float]:
    """Time of a step without a flood and beside each kind of it."""
    times: dict[str, list[float]] = {flood: [] for flood in ("", *FLOODS)}
    num_rounds = max(1, min(_FLOOD_ROUNDS, num_steps // 100))
    for number in range(num_rounds):
        sockets = folder / f"{number}"
        sockets.mkdir(mode=0o700)
        for flood in times:
            times[flood] += await _steps_beside_flood(flood, num_rows, num_steps // num_rounds, step_ms, sockets)
    figures: dict[str, float] = {}
    for flood, found in times.items():
        name = f"step, flood of {flood}" if flood else "step, no flood"
        figures[f"{name} p50 ms"], figures[f"{name} p99 ms"] = percentile(found, 0.5), percentile(found, 0.99)
        figures[f"{name} mean ms"] = statistics.fmean(found)
        if flood:
            figures[f"{name} ratio"] = figures[f"{name} mean ms"] / figures["step, no flood mean ms"]
    return figures


def play_flood(message: Message, endpoint: str) -> None:
    """An edge that sends as much as it is let."""
    is_over = False

    def stop(*_: object) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, stop)
    port = Port("edge 0", 1)
    port.connect("engine", 1, endpoint)
    while not is_over:
        while port.num_queued("engine") < _FLOOD_QUEUE:
            port.send("engine", message)
        port.wait(100)
        port.receive()
    port.close()


def _start_child(part: str, endpoint: str, own_endpoint: str, step_ms: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "octavo.actors.runtime.bench_port", "--part", part]
    command += ["--peer", endpoint, "--own", own_endpoint, "--step-ms", str(step_ms)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603  # this very module


def _stop_child(child: subprocess.Popen[bytes]) -> dict[str, list[float]]:
    """End it; the device says how long it waited between steps, in microseconds."""
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=30)
    told: dict[str, list[float]] = json.loads(out or b"{}")
    return told


def play_executor(part: str, endpoint: str, own_endpoint: str, step_ms: float) -> None:
    """The other process: answer each step at once, or after the device's time for it."""
    is_over = False

    def stop(*_: object) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, stop)
    port = Port("executor 0", 1, allowed={"engine": [ExecuteStep]})
    port.bind(own_endpoint)
    port.connect("engine", 1, endpoint)
    if part == "echo":
        answer: StepExecuted | None = None
        while not is_over:
            port.wait(100)
            for _, message in port.receive():
                assert isinstance(message, ExecuteStep)
                answer = answer or executed(message)
                port.send("engine", answer)
        told: dict[str, list[float]] = {}
    else:
        device: Device = QueueDevice(step_ms) if part == "queue" else BlockingDevice(step_ms)
        launched: LaunchAhead[Launched] = LaunchAhead(device)
        inbox: deque[Message] = deque()
        while not is_over:  # what `executor/process.py` does
            if not inbox and not launched.is_full:
                has_come = port.wait(0 if launched else 100)
                if has_come or not launched:
                    inbox.extend(message for _, message in port.receive())
            if launched.is_due(has_step=bool(inbox)):
                port.send("engine", launched.collect())
            elif inbox:
                step = inbox.popleft()
                assert isinstance(step, ExecuteStep)
                launched.launch(step)
            elif launched:
                time.sleep(50e-6)
        told = {"gaps": device.gaps_us}
        if isinstance(device, BlockingDevice):
            told["cpu"] = device.cpu_us
    port.close()
    print(json.dumps(told))


class Launched(msgspec.Struct):
    """A step on a stand-in device.

    Attributes:
        answer: what will come of it.
        ends_ns: when, by the monotonic clock.
    """

    answer: StepExecuted
    ends_ns: int


class Device:
    """What both stand-in devices have in common.

    Args:
        step_ms: time for a step.

    Attributes:
        gaps_us: between the end of each step and the beginning of the next.
    """

    max_launched = 1

    def __init__(self, step_ms: float) -> None:
        self.gaps_us: list[float] = []
        self._step_ns = int(step_ms * 1e6)
        self._ended_ns = 0

    def launch(self, step: ExecuteStep) -> Launched:
        """Begin a step once the last has ended."""
        begins_ns = max(time.monotonic_ns(), self._ended_ns)
        if self._ended_ns:
            self.gaps_us.append((begins_ns - self._ended_ns) / 1000)
        self._ended_ns = begins_ns + self._step_ns
        return Launched(executed(step), self._ended_ns)

    def is_done(self, launched: Launched) -> bool:
        """Whether it has ended."""
        return time.monotonic_ns() >= launched.ends_ns

    def collect(self, launched: Launched) -> StepExecuted:
        """Wait for its end."""
        delay_ns = launched.ends_ns - time.monotonic_ns()
        if delay_ns > 0:
            time.sleep(delay_ns / 1e9)
        return launched.answer


class QueueDevice(Device):
    """Computes beside the processor, one step after the other, as a GPU does on a stream."""

    max_launched = 2


class BlockingDevice(Device):
    """Computes on the thread that launches, and keeps it busy.

    Attributes:
        cpu_us: time that the thread itself took between steps; the rest of a gap others took, or nobody.
    """

    def __init__(self, step_ms: float) -> None:
        super().__init__(step_ms)
        self.cpu_us: list[float] = []
        self._ended_cpu_ns = 0

    def launch(self, step: ExecuteStep) -> Launched:
        """Compute a step."""
        if self._ended_ns:
            self.cpu_us.append((time.thread_time_ns() - self._ended_cpu_ns) / 1000)
        launched = super().launch(step)
        while time.monotonic_ns() < launched.ends_ns:
            pass
        self._ended_ns = launched.ends_ns = time.monotonic_ns()
        self._ended_cpu_ns = time.thread_time_ns()
        return launched


def main() -> int:
    """Measure and print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m octavo.actors.runtime.bench_port", description=__doc__)
    parser.add_argument("--rows", type=int, default=256, help="requests in a step")
    parser.add_argument("--hops", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=1000, help="of the stand-in device")
    parser.add_argument("--step-ms", type=float, default=6.0, help="time of the stand-in device for a step")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=["all", "echo", *PARTS, *FLOODS], default="all", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--own", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    configure_logs("auto")  # what a port counts is not among the figures
    if arguments.part in FLOODS:
        play_flood(FLOODS[arguments.part], arguments.peer)
        return 0
    if arguments.part != "all":
        play_executor(arguments.part, arguments.peer, arguments.own, arguments.step_ms)
        return 0
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as name:
        folder = Path(name)
        figures = measure_codec(arguments.rows)
        figures |= measure_port_cpu(arguments.rows, folder)
        figures |= asyncio.run(measure_hop(arguments.rows, arguments.hops, folder))
        for part in PARTS:
            figures |= asyncio.run(measure_idle(part, arguments.rows, arguments.steps, arguments.step_ms, folder))
        figures |= asyncio.run(measure_flood(arguments.rows, arguments.steps, arguments.step_ms, folder))
    bars = {"hop p50 us": HOP_BAR_US} | {f"idle, {part} p50 us": IDLE_BAR_US for part in PARTS}
    bars |= {f"step, flood of {flood} ratio": FLOOD_BAR for flood in FLOODS}
    is_good = all(figures[name] <= bar for name, bar in bars.items())
    if arguments.json:
        print(json.dumps({**figures, "bars": bars, "pass": is_good}))
        return 0 if is_good else 1
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"A link between processes over ipc://, a step of {arguments.rows} requests")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("bar", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}" if value < 10 else f"{value:.1f}", f"{bars[name]:g}" if name in bars else "")
    Console().print(table)
    print("PASS" if is_good else "FAIL")
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
