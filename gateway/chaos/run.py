"""`octavo chaos`: streams against a running server while its processes are killed, stopped and delayed.

First every request is answered twice without any fault: the answers to compare with. Then each seat streams one request
after another, and faults hit at random moments of the seed's choosing, each one after all seats have gone on since the
one before.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from ...messages.errors import OctavoError
from .faults import HOW_TO_RESTART, FaultKind, FaultNotDeliveredError, Injector, ProcessInjector
from .processes import ProcessNotFoundError, ServerProcesses
from .report import ChaosReport, print_report, stall_of
from .server import Restarter, served
from .workload import Recipe, StreamOutput, ask_served_model, difference, make_recipes, read_stream

MAX_FAILURES_TOLD = 10
DEFAULT_TIMES = 20
RETRY_S = 0.1
LOOK_EVERY_S = 0.02


class ChaosPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do.

    Attributes:
        victims: actors to hit, one of them at a time, at random.
        kinds: of faults, in the same way.
        times: faults; None for as many as fit in `for_s`.
        every_s: mean pause before each.
        give_up_s: a seat that hears nothing for so long makes the run fail.
        may_resume: a stream that breaks off is taken up by its last event's id, and one that had no event yet is asked
            for anew; for edges that are killed.
    """

    victims: tuple[str, ...]
    kinds: tuple[FaultKind, ...]
    num_streams: int
    times: int | None
    for_s: float
    seed: int
    every_s: float
    give_up_s: float
    may_resume: bool = False


class Totals(msgspec.Struct, frozen=True):
    """What the server's metrics say that happened since its start."""

    restarts: dict[str, int] = {}
    num_requeued: int = 0
    num_dropped_messages: int = 0
    num_quarantined: int = 0


class _Seat:
    """A client that has a stream open at any time, but for the moment between two."""

    def __init__(self) -> None:
        self.is_open = False
        self.last_s = 0.0
        self.worst_gap_s = 0.0
        self.num_news = 0
        self.was_open_at_fault = False

    def begin(self) -> None:
        self.is_open = True
        self.last_s = time.monotonic()

    def hear(self, now_s: float) -> None:
        self.worst_gap_s = max(self.worst_gap_s, now_s - self.last_s)
        self.last_s = now_s
        self.num_news += 1

    def take_gap(self) -> float | None:
        """The longest silence since the last fault, if a stream was open then; and begin anew."""
        gap_s = self.worst_gap_s if self.was_open_at_fault and self.num_news else None
        self.worst_gap_s = 0.0
        self.num_news = 0
        self.was_open_at_fault = self.is_open
        return gap_s


class ChaosRun:
    """One run against one server.

    Args:
        session: to the server.
        recipes: requests that the seats take in turn; at least as many as there are seats.
    """

    def __init__(self, session: aiohttp.ClientSession, plan: ChaosPlan, recipes: Sequence[Recipe]) -> None:
        self._session = session
        self._plan = plan
        self._recipes = recipes
        self._expected: list[StreamOutput] = []
        self._seats = [_Seat() for _ in range(plan.num_streams)]
        self._chance = random.Random(plan.seed)  # noqa: S311  # a plan, not a secret
        self._is_over = False
        self._num_started = self._num_finished = self._num_identical = 0
        self._num_resumed = self._num_asked_anew = 0
        self._next_recipe = 0
        self._gaps_s: list[float] = []
        self._faults: Counter[str] = Counter()
        self._failures: list[str] = []
        self.problems: list[str] = []
        self.num_unstable = 0

    async def record(self, bar: tqdm) -> None:
        """Ask everything twice, undisturbed, in two orders.

        Raises:
            OctavoError: something was not answered.
        """
        first = await self._ask_all(list(range(len(self._recipes))), bar)
        order = list(range(len(self._recipes)))
        self._chance.shuffle(order)
        second = await self._ask_all(order, bar)
        self._expected = [first[index] for index in range(len(self._recipes))]
        self.num_unstable = sum(bool(difference(first[index], second[index])) for index in order)

    async def _ask_all(self, order: list[int], bar: tqdm) -> dict[int, StreamOutput]:
        seats = asyncio.Semaphore(self._plan.num_streams)
        answers: dict[int, StreamOutput] = {}

        async def ask(index: int) -> None:
            async with seats:
                answers[index] = await read_stream(self._session, self._recipes[index])
            bar.update(1)

        await asyncio.gather(*map(ask, order))
        for index in order:
            if answers[index].error:
                raise OctavoError(
                    f"a request failed before any fault ({self._recipes[index].kind}): {answers[index].error}"
                )
        return answers

    async def disturb(self, injector: Injector, bar: tqdm) -> None:
        """Stream and inject until the plan is done, then let open streams end."""
        seats = [asyncio.create_task(self._sit(seat)) for seat in self._seats]
        try:
            await self._inject_all(injector, bar)
            self._is_over = True
            async with asyncio.timeout(self._plan.give_up_s):
                await self._until(lambda: all(task.done() for task in seats))
        except TimeoutError:
            self.problems.append(
                f"some streams had not ended {self._plan.give_up_s:.0f} s after the last fault, and were given up"
            )
        finally:
            self._is_over = True
            for task in seats:
                task.cancel()
            for seat, result in zip(self._seats, await asyncio.gather(*seats, return_exceptions=True), strict=True):
                if isinstance(result, Exception):
                    raise result
                gap_s = seat.take_gap()
                if gap_s is not None:
                    self._gaps_s.append(gap_s)
            await injector.close()

    async def _inject_all(self, injector: Injector, bar: tqdm) -> None:
        plan = self._plan
        ends_s = time.monotonic() + plan.for_s
        while (sum(self._faults.values()) < plan.times) if plan.times is not None else (time.monotonic() < ends_s):
            if not await self._wait_for_recovery(injector):
                return
            await asyncio.sleep(self._chance.uniform(0.0, 2 * plan.every_s))
            # Everybody has a stream open: between two of them a seat is away for a turn of the loop.
            await self._until(lambda: all(seat.is_open for seat in self._seats))
            actor, kind = self._chance.choice(plan.victims), self._chance.choice(plan.kinds)
            for seat in self._seats:
                gap_s = seat.take_gap()
                if gap_s is not None:
                    self._gaps_s.append(gap_s)
            try:
                await injector.inject(actor, kind)
            except FaultNotDeliveredError as error:
                self.problems.append(str(error))
                if plan.times is not None or len(self.problems) >= MAX_FAILURES_TOLD:
                    return
                continue
            self._faults[f"{actor} {kind}"] += 1
            bar.update(1 if plan.times is not None else 0)
            bar.set_postfix_str(f"{self._num_finished} streams, {self._num_finished - self._num_identical} differ")
        await self._wait_for_recovery(injector)

    async def _wait_for_recovery(self, injector: Injector) -> bool:
        """Until all who were hit are replaced and every seat has heard something since."""
        try:
            async with asyncio.timeout(self._plan.give_up_s):
                while not await injector.has_recovered():  # noqa: ASYNC110  # the kernel's processes send no events
                    await asyncio.sleep(LOOK_EVERY_S)
                await self._until(lambda: all(seat.num_news for seat in self._seats))
        except TimeoutError:
            num_silent = sum(not seat.num_news for seat in self._seats)
            if not num_silent and await injector.has_recovered():
                return True  # in the very last moment, and nobody had looked
            self.problems.append(
                f"{self._plan.give_up_s:.0f} s after fault {sum(self._faults.values())} "
                f"{num_silent} of {len(self._seats)} clients had heard nothing"
                if num_silent
                else f"who was hit by fault {sum(self._faults.values())} was not replaced"
            )
            return False
        return True

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110  # a look every few milliseconds beats an event at each of 64 clients
            await asyncio.sleep(LOOK_EVERY_S)

    async def _sit(self, seat: _Seat) -> None:
        while not self._is_over:
            index = self._next_recipe % len(self._recipes)
            self._next_recipe += 1
            self._num_started += 1
            seat.begin()
            output = await self._stream(self._recipes[index], seat)
            seat.is_open = False
            if output.error:
                self._fail(f"{self._recipes[index].kind}: {output.error}")
                await asyncio.sleep(RETRY_S)  # a server that refuses must not be asked in a tight loop
                continue
            self._num_finished += 1
            wrong = difference(self._expected[index], output)
            if wrong:
                self._fail(f"{self._recipes[index].kind}: {wrong}")
            else:
                self._num_identical += 1

    async def _stream(self, recipe: Recipe, seat: _Seat) -> StreamOutput:
        output = await read_stream(self._session, recipe, seat.hear)
        is_resumed = is_anew = False
        while self._plan.may_resume and output.error and time.monotonic() < seat.last_s + self._plan.give_up_s:
            await asyncio.sleep(RETRY_S)
            had_event = bool(output.last_event_id)
            is_resumed |= had_event
            is_anew |= not had_event
            output = await read_stream(self._session, recipe, seat.hear, resume=output if had_event else None)
        self._num_resumed += is_resumed
        self._num_asked_anew += is_anew
        return output

    def _fail(self, why: str) -> None:
        if len(self._failures) < MAX_FAILURES_TOLD:
            self._failures.append(why)

    def report(self, before: Totals, after: Totals, duration_s: float) -> ChaosReport:
        """The figures; the run passed only if everything asked for was done and nothing was lost or altered."""
        plan = self._plan
        num_faults = sum(self._faults.values())
        num_asked = plan.times if plan.times is not None else num_faults
        is_passed = (
            0 < num_asked == num_faults
            and 0 < self._num_started == self._num_finished == self._num_identical
            and not self.problems
        )
        return ChaosReport(
            is_passed=is_passed,
            seed=plan.seed,
            duration_s=round(duration_s, 3),
            num_started=self._num_started,
            num_finished=self._num_finished,
            num_identical=self._num_identical,
            num_recipes=len(self._recipes),
            num_unstable_recipes=self.num_unstable,
            num_faults_asked=num_asked,
            num_faults=num_faults,
            faults=dict(self._faults),
            num_resumed=self._num_resumed,
            num_asked_anew=self._num_asked_anew,
            stall=stall_of(self._gaps_s),
            # A server that was itself started anew counts from nothing.
            restarts={actor: max(0, num - before.restarts.get(actor, 0)) for actor, num in after.restarts.items()},
            num_requeued=max(0, after.num_requeued - before.num_requeued),
            num_dropped_messages=max(0, after.num_dropped_messages - before.num_dropped_messages),
            num_quarantined=max(0, after.num_quarantined - before.num_quarantined),
            failures=self._failures,
            problems=self.problems,
        )


async def scrape_totals(session: aiohttp.ClientSession) -> Totals:
    """Read what the server counts of faults; nothing if it cannot be asked."""
    try:
        async with session.get("/metrics") as response:
            text = await response.text()
    except aiohttp.ClientError:
        return Totals()
    return parse_totals(text)


def parse_totals(text: str) -> Totals:
    """From Prometheus' text format."""
    restarts: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "octavo:actor_restarts_total":
                restarts[sample.labels.get("actor", "")] += int(sample.value)
            elif sample.name.startswith("octavo:"):
                sums[sample.name] += int(sample.value)
    return Totals(
        dict(restarts),
        sums["octavo:requests_requeued_total"],
        sums["octavo:messages_dropped_total"],
        sums["octavo:requests_quarantined_total"],
    )


@asynccontextmanager
async def connected(url: str, api_key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without limits of its own."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    base = url.rstrip("/").removesuffix("/v1")
    async with aiohttp.ClientSession(base, headers=headers, connector=connector, timeout=timeout) as session:
        yield session


def chaos(arguments: argparse.Namespace) -> int:
    """Run, print, and return 0 only if nothing was lost."""
    report = asyncio.run(_chaos(arguments))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print_report(report)
    return int(not report.is_passed)


async def _chaos(arguments: argparse.Namespace) -> ChaosReport:
    if arguments.serve is not None:
        needs_journal = "edge" in (arguments.kill or ())
        async with served(arguments.url, arguments.serve, needs_journal=needs_journal) as restarter:
            return await _disturb_server(arguments, restarter)
    if arguments.restart is None:
        return await _disturb_server(arguments, None)
    with tempfile.TemporaryDirectory(prefix="octavo-chaos-") as folder:
        return await _disturb_server(arguments, Restarter(shlex.split(arguments.restart), Path(folder) / "serve.log"))


async def _disturb_server(arguments: argparse.Namespace, restarter: Restarter | None) -> ChaosReport:
    async with connected(arguments.url, arguments.api_key) as session:
        model = await ask_served_model(session)
        recipes = make_recipes(model, arguments.streams, seed=arguments.seed, max_output_len=arguments.output_len)
        plan = await _plan(arguments, ServerProcesses.behind(arguments.url), session)
        if "edge" in plan.victims and restarter is None:
            raise FaultNotDeliveredError(HOW_TO_RESTART)
        run = ChaosRun(session, plan, recipes)
        with tqdm(total=2 * len(recipes), desc="undisturbed", unit="req", leave=False) as bar:
            await run.record(bar)
        before = await scrape_totals(session)
        injector = ProcessInjector(
            lambda: ServerProcesses.behind(arguments.url),
            session,
            random.Random(plan.seed + 1),  # noqa: S311  # a plan, not a secret
            restarter=restarter,
            on_problem=run.problems.append,
        )
        started = time.monotonic()
        with tqdm(total=plan.times, desc="faults", unit="fault") as bar:
            await run.disturb(injector, bar)
        duration_s = time.monotonic() - started
        return run.report(before, await scrape_totals(session), duration_s)


async def _plan(arguments: argparse.Namespace, processes: ServerProcesses, session: aiohttp.ClientSession) -> ChaosPlan:
    present = [actor for actor in ("executor", "engine") if processes.doing(actor)]
    if arguments.kill:
        victims = tuple(arguments.kill)
    elif arguments.for_s:
        by_request = ("tokenizer", "detokenizer", *(() if present else ("executor",)))
        victims = (*present, *(by_request if await can_crash_by_request(session) else ()))
    else:
        victims = ("executor",)
    if not victims:
        raise ProcessNotFoundError(
            "this server has no processes titled 'octavo: executor' or 'octavo: engine', and makes no actor fail on "
            "request: start it without --in-process, or with --enable-fault-injection"
        )
    if arguments.signal == "STOP":
        for actor in victims:
            if not processes.doing(actor):
                raise ProcessNotFoundError(
                    f"there is no process titled 'octavo: {actor}' to stop: tokenizer and detokenizer share the edge's "
                    "process, and a server started with --in-process has but one"
                )
    return ChaosPlan(
        victims=victims,
        kinds=("KILL", "STOP", "DELAY") if arguments.for_s else (arguments.signal,),
        num_streams=arguments.streams,
        times=None if arguments.for_s else (arguments.times or DEFAULT_TIMES),
        for_s=arguments.for_s or 0.0,
        seed=arguments.seed,
        every_s=arguments.every,
        give_up_s=arguments.give_up,
        may_resume="edge" in victims,
    )


async def can_crash_by_request(session: aiohttp.ClientSession) -> bool:
    """Whether the server was started with --enable-fault-injection; asks for nobody's failure."""
    async with session.post("/debug/crash", json={"actor": ""}) as response:
        return response.status == 400
