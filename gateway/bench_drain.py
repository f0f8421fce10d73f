"""`octavo bench drain`: a server that is told to stop while it answers hundreds of streams.

Starts `octavo serve` itself, opens the streams, sends SIGTERM once all of them are accepted, and sees what becomes of
them, of whoever asks afterwards, and of the processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator

import aiohttp
import msgspec
import psutil
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..messages.errors import OctavoError
from .chaos.run import connected
from .chaos.workload import Recipe, StreamOutput, read_stream
from .latency import write_json
from .server_start import until_ready

MAX_LATE_EXIT_S = 2.0
"""After the limit, to tell clients and end the processes."""

MAX_READY_S = 0.1
LOOK_EVERY_S = 0.005
_SHUTDOWN_CODE = "server_shutdown"


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        is_passed: nobody lost an answer for which there was time, nobody was left without a word, and the server ended
            when it should and as it should.
        num_finished: streams with all their tokens.
        num_told: streams that were ended with a typed error, as their time was over.
        num_dropped: streams that ended otherwise.
        unready_s: from the signal until `/ready` did not answer 200 any more.
        is_refused_in_words: whether a new request got 503 with Retry-After and the end of its connection; None if the
            server was gone before one could be asked.
        exit_s: from the signal until the server's process had ended.
        num_left: of its processes, after that.
    """

    is_passed: bool
    num_streams: int
    limit_s: float
    num_finished: int
    num_told: int
    num_dropped: int
    unready_s: float
    is_refused_in_words: bool | None
    exit_s: float
    exit_code: int
    num_left: int
    failures: list[str]


class DrainPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do.

    Attributes:
        serve_flags: of `octavo serve`; the model first, if it is not the shipped one.
        num_tokens: of each stream.
        limit_s: of the drain.
    """

    serve_flags: tuple[str, ...] = ()
    num_streams: int
    num_tokens: int
    limit_s: float
    seed: int = 0


class _Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen from the signal on; the attributes are `DrainReport`'s."""

    unready_s: float
    is_refused_in_words: bool | None
    exit_s: float = 0.0
    exit_code: int = 0
    num_left: int = 0


def bench_drain(arguments: argparse.Namespace) -> int:
    """Measure, print, and return 0 only if nobody was dropped."""
    plan = DrainPlan(
        serve_flags=(*([arguments.model] if arguments.model else []), *arguments.serve_flags),
        num_streams=arguments.streams,
        num_tokens=arguments.output_len,
        limit_s=arguments.limit_s,
        seed=arguments.workload_seed,
    )
    report = asyncio.run(drain(plan, is_shown=True))
    print_drain(report)
    write_json(report, arguments.json)
    return int(not report.is_passed)


async def drain(plan: DrainPlan, *, is_shown: bool = False) -> DrainReport:
    """Start a server, and stop it under load.

    Raises:
        OctavoError: it does not start, or ends before it is told to.
    """
    with _reserved_port() as port:
        url = f"http://127.0.0.1:{port}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "octavo", "serve", *plan.serve_flags),
            *("--host", "127.0.0.1", "--port", str(port), "--drain-timeout", str(plan.limit_s)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await until_ready(url, process, lambda: "see what `octavo serve` says")
            async with connected(url, None) as session:
                return await _Drain(session, process, plan).run(is_shown=is_shown)
        finally:
            if process.returncode is None:
                process.kill()  # its children die with it
                await process.wait()


class _Drain:
    def __init__(self, session: aiohttp.ClientSession, process: asyncio.subprocess.Process, plan: DrainPlan) -> None:
        self._session = session
        self._process = process
        self._plan = plan
        chance = random.Random(plan.seed)  # noqa: S311  # a workload, not a secret
        self._recipes = [_recipe(chance, plan.num_tokens) for _ in range(plan.num_streams)]

    async def run(self, *, is_shown: bool) -> DrainReport:
        with tqdm(total=len(self._recipes), desc="streams", unit="stream", disable=not is_shown) as bar:
            streams = [asyncio.create_task(self._stream(recipe, bar)) for recipe in self._recipes]
            try:
                await self._until_accepted(streams)
                family = psutil.Process(self._process.pid).children(recursive=True)
                told_s = time.monotonic()
                self._process.send_signal(signal.SIGTERM)
                seen = await self._see_refusals(told_s)
                code = await asyncio.wait_for(self._process.wait(), self._plan.limit_s + 60)
                exit_s = time.monotonic() - told_s
                outputs = await asyncio.gather(*streams)
            finally:
                for stream in streams:
                    stream.cancel()
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, 1.0)
        return report_of(
            self._plan,
            outputs,
            msgspec.structs.replace(seen, exit_s=exit_s, exit_code=code, num_left=len(alive)),
        )

    async def _stream(self, recipe: Recipe, bar: tqdm) -> StreamOutput:
        output = await read_stream(self._session, recipe)
        bar.update(1)
        return output

    async def _until_accepted(self, streams: list[asyncio.Task[StreamOutput]]) -> None:
        """Until every stream is known to the server; those that have ended meanwhile were too short to say anything."""
        while True:
            num_over = sum(stream.done() for stream in streams)
            if num_over:
                raise OctavoError(
                    f"{num_over} streams were over before all {len(streams)} were accepted "
                    f"({next(stream for stream in streams if stream.done()).result().error or 'answered in full'}): "
                    "give them more tokens (--output-len)"
                )
            async with self._session.get("/load") as response:
                if (await response.json())["server_load"] >= len(streams):
                    return
            await asyncio.sleep(LOOK_EVERY_S)

    async def _see_refusals(self, told_s: float) -> _Seen:
        """When the server says that it is not ready, and whether it refuses new work as it should."""
        try:
            while True:
                asked_s = time.monotonic()
                async with self._session.get("/ready") as response:
                    if response.status != 200:
                        unready_s = asked_s - told_s
                        break
                await asyncio.sleep(LOOK_EVERY_S)
            headers = {"Content-Type": "application/json"}
            async with self._session.post("/v1/completions", data=self._recipes[0].body, headers=headers) as response:
                is_refused = (
                    response.status == 503
                    and response.headers.get("Retry-After", "").isdecimal()
                    and response.headers.get("Connection", "").lower() == "close"
                )
        except aiohttp.ClientError:
            return _Seen(unready_s=time.monotonic() - told_s, is_refused_in_words=None)
        return _Seen(unready_s=unready_s, is_refused_in_words=is_refused)


def report_of(plan: DrainPlan, outputs: list[StreamOutput], seen: _Seen) -> DrainReport:
    """The verdict on what became of the streams, and of the server."""
    finished = [not output.error and output.num_output_tokens == plan.num_tokens for output in outputs]
    num_told = sum(output.error.startswith(_SHUTDOWN_CODE) for output in outputs)
    num_dropped = len(outputs) - sum(finished) - num_told
    had_time = seen.exit_s < plan.limit_s
    is_passed = (
        not num_dropped
        and (all(finished) or not had_time)
        and seen.is_refused_in_words is not False
        and seen.unready_s <= MAX_READY_S
        and seen.exit_s <= plan.limit_s + MAX_LATE_EXIT_S
        and seen.exit_code == seen.num_left == 0
    )
    failures = [output.error or "too few tokens" for output, ok in zip(outputs, finished, strict=True) if not ok]
    return DrainReport(
        is_passed=is_passed,
        num_streams=len(outputs),
        limit_s=plan.limit_s,
        num_finished=sum(finished),
        num_told=num_told,
        num_dropped=num_dropped,
        unready_s=round(seen.unready_s, 4),
        is_refused_in_words=seen.is_refused_in_words,
        exit_s=round(seen.exit_s, 2),
        exit_code=seen.exit_code,
        num_left=seen.num_left,
        failures=failures[:5],
    )


def _recipe(chance: random.Random, num_tokens: int) -> Recipe:
    body = {
        "prompt": f"{chance.getrandbits(128):x}",
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Recipe("greedy", msgspec.json.encode(body), 1)


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that nobody else is given until the server listens there.

    One that is merely free may be the local end of some connection by then. So it stays bound here, without listening,
    in the way that lets a server bind it as well.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name == "posix"))
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def print_drain(report: DrainReport) -> None:
    """A table for a person."""
    in_words = {True: "503 and Retry-After", False: "[red]otherwise[/]", None: "the server was gone before"}
    table = Table(title="octavo bench drain", title_justify="left", show_header=False)
    table.add_row("streams", str(report.num_streams))
    table.add_row("finished / told / dropped", f"{report.num_finished} / {report.num_told} / {report.num_dropped}")
    table.add_row("not ready after", f"{1e3 * report.unready_s:.0f} ms")
    table.add_row("new requests", in_words[report.is_refused_in_words])
    table.add_row(f"ended after (limit {report.limit_s:g} s)", f"{report.exit_s:.1f} s, code {report.exit_code}")
    table.add_row("processes left", str(report.num_left))
    table.add_row("verdict", "[green]passed[/]" if report.is_passed else "[red]failed[/]")
    console = Console()
    console.print(table)
    for line in report.failures:
        console.print(f"- {line}", markup=False, highlight=False)
