"""Hours of work in minutes: a server at saturation, clients that leave, actors that die; does anything pile up?

    python -m octavo.gateway.soak --for 30m

An engine and its server run in this process (and those that they start), the clients in another one. After a warm-up,
when nothing is open, everything is counted; then again at the end. What grew is a leak: blocks, file descriptors,
tasks, shared memory, and memory (RSS) beyond a per cent. Exit status 0: nothing did, and no request failed.

Before the first count every KV block has been written: the system gives a page of the cache its memory only then. At
both counts this process has given back what its malloc keeps of freed memory: how large the largest step was is chance.
With `--processes` only the edge can do that; a step of the executor that was larger than all before may count there.

Memory is compared of processes that are still the same. With `--processes` hardly any executor lives from the first
count to the last; so there is a stretch without faults at the end, with a warm-up and two counts of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import aiohttp
import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from ..actors.runtime.logs import configure_logs
from ..messages.errors import InvalidRequestError
from ..messages.request import TextDelta
from ..messages.sampling import SamplingParams
from .api.engine_protocol import EngineEvent, EngineLike
from .api.fault_injection import CrashesActors
from .api.server import RunningServer, start_http
from .api.settings import ServerSettings
from .chaos.processes import ServerProcesses
from .chaos.workload import Recipe, ask_served_model, make_recipes, read_stream
from .durations import duration
from .soak_holdings import Holdings, compare, holdings_when_quiet, keep_one_heap, replaced

FAULT_PAUSE_S: Final = 1.0
"""Least time between two faults: each is to be recovered from before the next."""

FILL_BLOCKS: Final = 16
"""Of each prompt that fills the KV cache."""

LOOK_EVERY_S: Final = 0.1
_CRASHABLE: Final = ("executor", "detokenizer", "tokenizer")


class Work(msgspec.Struct):
    """What the clients did."""

    num_finished: int = 0
    num_left: int = 0
    num_failed: int = 0
    failures: list[str] = []

    def add(self, more: Work) -> None:
        """What they did afterwards."""
        self.num_finished += more.num_finished
        self.num_left += more.num_left
        self.num_failed += more.num_failed
        self.failures += more.failures


class SoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict.

    Attributes:
        leaks: a line for each kind of thing that grew; empty if nothing did.
        rss_growth: by process title, as a share.
        calm_growth: the same of the stretch without faults; empty if there was none.
        faults: actors that were made to fail, by name.
    """

    is_passed: bool
    seconds: float
    num_finished: int
    num_left: int
    num_failed: int
    faults: dict[str, int]
    leaks: list[str]
    rss_growth: dict[str, float]
    calm_growth: dict[str, float]
    failures: list[str]
    before: Holdings
    after: Holdings


class SoakPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do to the server.

    Attributes:
        warm_up_s, for_s: before the first count, and between the two.
        num_streams: clients, each with one request after another.
        fault_share: of requests at which an actor is made to fail.
        leave_share: of requests whose client leaves early.
        most_tokens: of an answer.
        calm_s: of the stretch without faults at the end, and of the warm-up before it; 0 for none.
    """

    warm_up_s: float
    for_s: float
    num_streams: int
    fault_share: float = 0.01
    leave_share: float = 0.1
    most_tokens: int = 64
    seed: int = 0
    calm_s: float = 0.0


async def soak(engine: EngineLike, plan: SoakPlan, *, clients_inside: bool = False) -> SoakReport:
    """Run the plan against an engine that is running.

    Args:
        clients_inside: the clients run in this process, whose files and memory then are theirs too.
    """
    server = await start_http(engine, ServerSettings(log_requests=False))
    breaker = _Breaker(engine, server, plan)
    try:
        await _half_close(server.port)
        await _disturbed(breaker, server.port, msgspec.structs.replace(plan, for_s=plan.warm_up_s), clients_inside)
        unfilled = await fill_kv_cache(engine, plan.seed)
        before = await holdings_when_quiet(engine, server)
        breaker.faults.clear()
        started_s = time.monotonic()
        work = await _disturbed(breaker, server.port, msgspec.structs.replace(plan, seed=plan.seed + 1), clients_inside)
        seconds = time.monotonic() - started_s
        after = await holdings_when_quiet(engine, server)
        leaks, growth = compare(before, after)
        calm_growth: dict[str, float] = {}
        if plan.calm_s:
            calm_leaks, calm_growth = await _calm(engine, server, plan, work, clients_inside)
            leaks += [f"without faults: {leak}" for leak in calm_leaks]
    finally:
        await server.close()
    work.failures += unfilled
    if plan.fault_share and not breaker.faults:
        work.failures.append("no actor could be made to fail, or there were too few requests for one")
    return SoakReport(
        is_passed=not leaks and not work.failures and work.num_finished > 0,
        seconds=round(seconds, 1),
        num_finished=work.num_finished,
        num_left=work.num_left,
        num_failed=work.num_failed,
        faults=dict(breaker.faults),
        leaks=leaks,
        rss_growth={title: round(share, 4) for title, share in growth.items()},
        calm_growth={title: round(share, 4) for title, share in calm_growth.items()},
        failures=work.failures,
        before=before,
        after=after,
    )


async def _calm(
    engine: EngineLike, server: RunningServer, plan: SoakPlan, work: Work, clients_inside: bool
) -> tuple[list[str], dict[str, float]]:
    """Go on without faults, and compare: what the processes that are there at the end of the faults gather themselves.

    Adds what the clients did to `work`.
    """
    calm = msgspec.structs.replace(plan, for_s=plan.calm_s, seed=plan.seed + 2)
    work.add(await _drive(server.port, calm, clients_inside))
    work.failures += await fill_kv_cache(engine, calm.seed)
    before = await holdings_when_quiet(engine, server)
    work.add(await _drive(server.port, msgspec.structs.replace(calm, seed=plan.seed + 3), clients_inside))
    after = await holdings_when_quiet(engine, server)
    leaks, growth = compare(before, after)
    return [*leaks, *replaced(before, after)], growth


async def fill_kv_cache(engine: EngineLike, seed: int) -> list[str]:
    """Write every KV block once, by prompts that have no prefix in common; returns what went wrong.

    A page of the cache takes memory when it is first written. Clients that ask the same few things again and again
    leave part of the cache unwritten for hours, until they ask something else: which then looks like a leak.
    """
    block_size = engine.config.block_size
    most_blocks = max(1, min(FILL_BLOCKS, (engine.max_model_len - 1) // block_size))
    # Whole blocks: the prefix index keeps each, so that the next prompt takes others for as long as there are any.
    num_tokens = min(most_blocks * block_size, engine.max_model_len - 1)
    chance = random.Random(seed)  # noqa: S311  # tokens, not secrets
    token_ids = [token for token in range(engine.vocab_size) if token not in engine.special_token_ids]
    # One after another: a step larger than the clients' would leave the heap larger than theirs do, and room for leaks.
    num_prompts = -(-engine.num_blocks // most_blocks)
    ends = [await _first_token(engine, chance.choices(token_ids, k=num_tokens)) for _ in range(num_prompts)]
    errors = [error for error in ends if error]
    return [f"{len(errors)} prompts that were to fill the KV cache failed: {errors[0]}"] if errors else []


async def _first_token(engine: EngineLike, prompt: list[int]) -> str:
    """Have a prompt computed; returns why it was not, or nothing."""
    over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def hear(event: EngineEvent) -> None:
        if isinstance(event, TextDelta) and event.finish_reason is not None and not over.done():
            is_whole = event.finish_reason in ("stop", "length")
            over.set_result("" if is_whole else event.ended.error if event.ended else event.finish_reason)

    engine.submit(prompt, SamplingParams(max_tokens=1, temperature=0.0), hear)
    return await over


async def _half_close(port: int) -> None:
    """Send a request and close that half of the connection: what a server makes at the first such client, it keeps."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"prompt":"x","max_tokens":2}'
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    writer.write_eof()
    await reader.read()
    writer.close()
    await writer.wait_closed()


async def _disturbed(breaker: _Breaker, port: int, plan: SoakPlan, is_inside: bool) -> Work:
    breaking = asyncio.create_task(breaker.run())
    try:
        return await _drive(port, plan, is_inside)
    finally:
        breaking.cancel()
        await asyncio.gather(breaking, return_exceptions=True)


class _Breaker:
    """Makes an actor fail at every so many-th request: executors by a signal to their process, others on request."""

    def __init__(self, engine: EngineLike, server: RunningServer, plan: SoakPlan) -> None:
        self.faults: Counter[str] = Counter()
        self._engine = engine
        self._server = server
        self._every = max(1, round(1 / plan.fault_share)) if plan.fault_share else 0
        self._chance = random.Random(plan.seed)  # noqa: S311  # a plan, not a secret
        self._processes = ServerProcesses(psutil.Process())
        self._on_request = list(_CRASHABLE) if isinstance(engine, CrashesActors) else []

    async def run(self) -> None:
        """Until cancelled."""
        if not self._every:
            return
        num_due = self._server.num_admitted + self._every
        while True:
            # Requests beyond those that make one fault due are not made up for: each fault is recovered from first.
            await asyncio.sleep(LOOK_EVERY_S)
            if self._server.num_admitted >= num_due and self._engine.is_ready:
                self._break_one()
                num_due = self._server.num_admitted + self._every
                await asyncio.sleep(FAULT_PAUSE_S)

    def _break_one(self) -> None:
        executors = self._processes.doing("executor")
        ways = [*(["executor"] if executors else []), *(actor for actor in self._on_request if actor != "executor")]
        if not executors and "executor" in self._on_request:
            ways.append("executor")
        if not ways:
            return
        actor = self._chance.choice(ways)
        if actor == "executor" and executors:
            try:
                self._chance.choice(executors).send_signal(signal.SIGKILL)
            except psutil.Error:
                return  # it has just gone
        else:
            assert isinstance(self._engine, CrashesActors)
            try:
                self._engine.crash_actor(actor)
            except InvalidRequestError:
                self._on_request.remove(actor)  # this engine's cannot be made to fail
                return
        self.faults[actor] += 1


async def _drive(port: int, plan: SoakPlan, is_inside: bool) -> Work:
    """Let the clients work for `for_s`."""
    if is_inside:
        return await run_clients(port, plan)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __spec__.name if __spec__ else __name__),
        *("--connect", str(port), "--plan", msgspec.json.encode(plan).decode()),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return msgspec.json.decode(output, type=Work)


async def run_clients(port: int, plan: SoakPlan) -> Work:
    """So many clients, each with one request after another; some leave before their answer is whole."""
    work = Work()
    chance = random.Random(plan.seed)  # noqa: S311  # a plan, not a secret
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector, timeout=timeout) as session:
        model = await ask_served_model(session)
        recipes = make_recipes(model, 64, seed=plan.seed, max_output_len=plan.most_tokens)
        ends_s = time.monotonic() + plan.for_s

        async def client() -> None:
            while time.monotonic() < ends_s:
                recipe = chance.choice(recipes)
                if chance.random() < plan.leave_share:
                    await _ask_and_leave(session, recipe, chance.randrange(0, 12))
                    work.num_left += 1
                    continue
                output = await read_stream(session, recipe)
                if not output.error:
                    work.num_finished += 1
                    continue
                work.num_failed += 1
                if len(work.failures) < 5:
                    work.failures.append(f"{recipe.kind}: {output.error}")
                await asyncio.sleep(LOOK_EVERY_S)  # a server that refuses must not be asked in a tight loop

        await asyncio.gather(*(client() for _ in range(plan.num_streams)))
    return work


class _LeftError(Exception):
    """The client has had enough."""


async def _ask_and_leave(session: aiohttp.ClientSession, recipe: Recipe, num_news: int) -> None:
    """Leave after so many pieces of the answer; after none: while it waits for the first."""
    num_heard = 0

    def hear(_now_s: float) -> None:
        nonlocal num_heard
        num_heard += 1
        if num_heard >= num_news:
            raise _LeftError

    asking = asyncio.create_task(read_stream(session, recipe, hear))
    if not num_news:
        await asyncio.wait([asking], timeout=0.005)
        asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def print_soak(report: SoakReport) -> None:
    """A table for a person."""
    table = Table(title="octavo soak", title_justify="left", show_header=False)
    table.add_row("time", f"{report.seconds:.0f} s")
    table.add_row("finished / left / failed", f"{report.num_finished} / {report.num_left} / {report.num_failed}")
    table.add_row("faults", ", ".join(f"{name}: {count}" for name, count in sorted(report.faults.items())) or "none")
    for title, share in sorted(report.rss_growth.items()):
        size = report.after.rss_bytes[title] / 2**20
        table.add_row(f"memory of {title}", f"{100 * share:+.2f} %, {size:.0f} MiB")
    for title, share in sorted(report.calm_growth.items()):
        table.add_row(f"memory of {title}, without faults", f"{100 * share:+.2f} %")
    table.add_row("verdict", "[green]passed[/]" if report.is_passed else "[red]failed[/]")
    console = Console()
    console.print(table)
    for line in (*report.leaks, *report.failures):
        console.print(f"- {line}", markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; returns 0 only if nothing leaked and nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="folder, GGUF file or hub name; without one, the model that is shipped"
    )
    parser.add_argument("--for", dest="for_s", type=duration, default=1800.0, metavar="TIME", help="default: 30m")
    parser.add_argument("--warm-up", dest="warm_up_s", type=duration, metavar="TIME", help="default: a sixth of that")
    parser.add_argument("--streams", type=int, default=64, help="clients; as many sequences run at a time")
    parser.add_argument("--faults", type=float, default=0.01, help="share of requests at which an actor fails")
    parser.add_argument("--leave", type=float, default=0.1, help="share of clients that leave early")
    parser.add_argument(
        "--processes", action="store_true", help="engine and executor in processes of their own, as of `octavo serve`"
    )
    parser.add_argument(
        "--calm",
        dest="calm_s",
        type=duration,
        metavar="TIME",
        help="without faults, at the end; default: a sixth of --for with --processes, else none",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--connect", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.connect is not None:
        work = asyncio.run(run_clients(options.connect, msgspec.json.decode(options.plan, type=SoakPlan)))
        print(msgspec.json.encode(work).decode())
        return 0
    plan = SoakPlan(
        warm_up_s=options.warm_up_s or options.for_s / 6,
        for_s=options.for_s,
        num_streams=options.streams,
        fault_share=options.faults,
        leave_share=options.leave,
        seed=options.seed,
        calm_s=(options.for_s / 6 if options.processes else 0.0) if options.calm_s is None else options.calm_s,
    )
    keep_one_heap()
    configure_logs("auto")  # to standard error, and without the variables of a traceback's frames
    report = asyncio.run(_soak_model(options.model, plan, in_process=not options.processes))
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print_soak(report)
    return int(not report.is_passed)


async def _soak_model(model: str | None, plan: SoakPlan, *, in_process: bool) -> SoakReport:
    from .engine import Engine

    # A small pool: it is soon full, so that the prefix cache evicts.
    num_blocks = max(1024, 16 * plan.num_streams)
    async with Engine(model, max_num_seqs=plan.num_streams, num_blocks=num_blocks, in_process=in_process) as engine:
        return await soak(engine, plan)


if __name__ == "__main__":
    sys.exit(main())
