"""`python -m octavo.actors.runtime.bench_port`: what a link between processes costs, and what it costs the device.

Three measurements, each over `ipc://`, with the messages of a step of 256 decoding requests:

- the hop: half a round trip of `ExecuteStep` one way and `StepExecuted` back, between a process with an event loop and
  a blocking one, one message in flight;
- CPU time of encoding, of decoding, and of a send and a receive by themselves;
- how long an executor idles between steps of a stand-in device that takes a fixed time for each, with the real
  scheduler and allocator cores in the other process and two steps in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ...messages.base import Message
from ...messages.ids import BlockId, Epoch, RequestId, StepId
from ...messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks
from ...messages.request import SubmitRequest
from ...messages.sampling import SamplingParams
from ...messages.step import ExecuteStep, PlanDue, PlanStep, StepExecuted
from ..kv_allocator.config import AllocatorConfig
from ..kv_allocator.core import KVAllocatorCore
from ..scheduler.config import SchedulerConfig
from ..scheduler.core import SchedulerCore
from .asyncio_port import attach
from .port import Port
from .wire import Decoder, Encoder

HOP_BAR_US = 150.0
IDLE_BAR_US = 120.0
BLOCK_SIZE = 16


def decode_step(num_rows: int, step: int = 1000) -> ExecuteStep:
    """A step in which every request decodes a token, and a sixteenth of them needs a block."""
    ids = tuple(RequestId(10_000 + row) for row in range(num_rows))
    grow = tuple((request_id, (BlockId(50_000 + request_id),)) for request_id in ids[::BLOCK_SIZE])
    return ExecuteStep(Epoch(0), StepId(step), ids, (1,) * num_rows, append_blocks=grow)


def executed(step: ExecuteStep, execute_ns: int = 6_000_000) -> StepExecuted:
    """Its answer."""
    tokens = tuple(300 + row * 97 % 30_000 for row in range(len(step.request_ids)))
    return StepExecuted(step.epoch, step.step_id, step.request_ids, tokens, execute_ns=execute_ns)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


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
    return figures


def measure_port_cpu(num_rows: int, folder: Path) -> dict[str, float]:
    """CPU time of this thread for a send and for a receive (ZeroMQ's own thread not counted)."""
    there = Port("executor 0", 1, allowed={"engine": [ExecuteStep]})
    here = Port("engine", 1, allowed={"executor": [StepExecuted]})
    here.connect("executor 0", 1, there.bind(f"ipc://{folder}/cpu"))
    step = decode_step(num_rows)
    send_ns, receive_ns, num = 0, 0, 3000
    while not here.is_up("executor 0"):
        there.wait(20)
        there.receive()
        here.receive()
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
    here.close()
    there.close()
    return {"send us": send_ns / num / 1000, "receive us": receive_ns / num / 1000}


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


class Ring:
    """Scheduler and allocator cores behind a port, with requests that decode for ever."""

    def __init__(self, num_running: int, max_tokens: int, send: Callable[[ExecuteStep], object]) -> None:
        num_blocks = num_running * (max_tokens // BLOCK_SIZE + 8)
        self._scheduler = SchedulerCore(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_size=BLOCK_SIZE,
                max_model_len=max_tokens + 64,
                max_num_seqs=num_running,
                max_num_batched_tokens=num_running * 32,
                pipeline_depth=2,
                enable_prefix_caching=False,
            )
        )
        self._allocator = KVAllocatorCore(
            AllocatorConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE, enable_prefix_caching=False)
        )
        self._send = send
        self._inbox: deque[Message] = deque()
        for number in range(num_running):
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=number)
            prompt = array("i", range(300, 316)).tobytes()
            self._inbox.append(SubmitRequest(RequestId(10_000 + number), prompt, params))

    def hear(self, message: Message) -> None:
        """Take a message, and plan once the inbox is drained, as the runtimes do."""
        inbox = self._inbox
        inbox.append(message)
        while inbox:
            while inbox:
                self._handle(inbox.popleft())
            self._handle(PlanDue())

    def _handle(self, message: Message) -> None:
        now_ns = time.monotonic_ns()
        for answer in self._scheduler.handle(message, now_ns):  # type: ignore[arg-type]  # of its inbox, by construction
            if isinstance(answer, (PlanStep, MatchPrefix, ReleaseMatch, ResetBlocks)):
                for stamped in self._allocator.handle(answer, now_ns):
                    if isinstance(stamped, ExecuteStep):
                        self._send(stamped)
                    elif isinstance(stamped, (PrefixMatched, BlocksFreed)):
                        self._inbox.append(stamped)


async def measure_idle(num_rows: int, num_steps: int, step_ms: float, folder: Path) -> dict[str, float]:
    """How long the stand-in device waits between steps."""
    loop = asyncio.get_running_loop()
    port = Port("engine", 1, allowed={"executor": [StepExecuted]})
    endpoint = port.bind(f"ipc://{folder}/idle.engine")
    child = _start_child("device", endpoint, f"ipc://{folder}/idle.executor", step_ms)
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
        gaps_us = _stop_child(child)
    assert len(gaps_us) >= num_steps, "the stand-in executor says too little"
    gaps_us = gaps_us[100 : 100 + num_steps]
    return {
        "idle p50 us": percentile(gaps_us, 0.5),
        "idle p90 us": percentile(gaps_us, 0.9),
        "idle p99 us": percentile(gaps_us, 0.99),
        "idle mean us": statistics.fmean(gaps_us),
    }


def _start_child(part: str, endpoint: str, own_endpoint: str, step_ms: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "octavo.actors.runtime.bench_port", "--part", part]
    command += ["--peer", endpoint, "--own", own_endpoint, "--step-ms", str(step_ms)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603  # this very module


def _stop_child(child: subprocess.Popen[bytes]) -> list[float]:
    """End it; the device says how long it waited."""
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=30)
    return [float(gap) for gap in json.loads(out or b"[]")]


def play_executor(endpoint: str, own_endpoint: str, step_ms: float) -> None:
    """The other process: answer each step at once, or after the device's time for it.

    The device runs beside the processor, as a GPU does: a step is *launched* when the former one has ended and its
    message is there. Idle is the time from the end of a step to the launch of the next.
    """
    is_over = False

    def stop(*_: object) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, stop)
    port = Port("executor 0", 1, allowed={"engine": [ExecuteStep]})
    port.bind(own_endpoint)
    port.connect("engine", 1, endpoint)
    step_ns = int(step_ms * 1e6)
    timer = _Timer()
    poll = select.poll()
    poll.register(port.fileno(), select.POLLIN)
    poll.register(timer.fileno(), select.POLLIN)
    waiting: list[ExecuteStep] = []
    running: ExecuteStep | None = None
    ended_ns = 0
    gaps_us: list[float] = []
    while not is_over:
        if not port.has_more:
            poll.poll(100)
        for _, message in port.receive():
            assert isinstance(message, ExecuteStep)
            if step_ns == 0:
                port.send("engine", executed(message, 0))
            else:
                waiting.append(message)
        now_ns = time.monotonic_ns()
        if running is not None and now_ns >= ended_ns:
            finished, running = running, None
            if waiting:  # launch before answering, as an executor with its next step at hand does
                running = waiting.pop(0)
                launched_ns = time.monotonic_ns()
                gaps_us.append((launched_ns - ended_ns) / 1000)
                ended_ns = launched_ns + step_ns
                timer.set(ended_ns)
            port.send("engine", executed(finished))
        if running is None and waiting:
            running = waiting.pop(0)
            launched_ns = time.monotonic_ns()
            if ended_ns:
                gaps_us.append((launched_ns - ended_ns) / 1000)
            ended_ns = launched_ns + step_ns
            timer.set(ended_ns)
    port.close()
    print(json.dumps(gaps_us))


class _Timer:
    """The stand-in device's interrupt: a descriptor that is readable at a monotonic time (a thread that sleeps)."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self._due = threading.Semaphore(0)
        self._at_ns = 0
        threading.Thread(target=self._run, daemon=True).start()

    def fileno(self) -> int:
        return self._read

    def set(self, at_ns: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 64)
        self._at_ns = at_ns
        self._due.release()

    def _run(self) -> None:
        while True:
            self._due.acquire()
            time.sleep(max(0, self._at_ns - time.monotonic_ns()) / 1e9)
            os.write(self._write, b"x")


def main() -> int:
    """Measure and print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m octavo.actors.runtime.bench_port", description=__doc__)
    parser.add_argument("--rows", type=int, default=256, help="requests in a step")
    parser.add_argument("--hops", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=1000, help="of the stand-in device")
    parser.add_argument("--step-ms", type=float, default=6.0, help="time of the stand-in device for a step")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=["all", "echo", "device"], default="all", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--own", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part != "all":
        play_executor(arguments.peer, arguments.own, arguments.step_ms if arguments.part == "device" else 0.0)
        return 0
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as name:
        folder = Path(name)
        figures = measure_codec(arguments.rows)
        figures |= measure_port_cpu(arguments.rows, folder)
        figures |= asyncio.run(measure_hop(arguments.rows, arguments.hops, folder))
        figures |= asyncio.run(measure_idle(arguments.rows, arguments.steps, arguments.step_ms, folder))
    bars = {"hop p50 us": HOP_BAR_US, "idle p50 us": IDLE_BAR_US}
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
        table.add_row(name, f"{value:.1f}", f"{bars[name]:.0f}" if name in bars else "")
    Console().print(table)
    print("PASS" if is_good else "FAIL")
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
