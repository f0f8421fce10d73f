"""`octavo bench overload`: far more requests than a running server can answer, and what becomes of those it takes.

Peak goodput is that of so many clients, each with one request after another. Then requests come at a multiple of that
rate, at random moments (Poisson), from clients that wait for nobody and do not come again. Goodput is requests answered
in full per second, in both.

A refusal's time is taken three times. From sending the request until the refusal is at the client's socket, as the
system stamps it: this is the one with the limit, since all that the server and the network did is in it, and nothing of
what this program did. Until this program, which waits for a processor like the server, has read it. And by the server's
own account, from the arrival of a request's bytes at its socket until they are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import time

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..actors.runtime.percentile import percentile
from ..messages.errors import OctavoError
from .latency import write_json
from .lean_client import LeanAnswer, LeanClient

MIN_GOODPUT_SHARE = 0.9
MAX_REFUSAL_S = 0.02
MAX_RECOVERY_S = 10.0
NUM_PROBES = 5
PROBE_EVERY_S = 0.2
GIVE_UP_RECOVERY_S = 120.0


class RefusalTimes(msgspec.Struct, frozen=True):
    """Seconds to a refusal; None if there were none."""

    p50_s: float | None
    p99_s: float | None
    p999_s: float | None
    max_s: float | None

    @classmethod
    def of(cls, times_s: list[float]) -> RefusalTimes:
        if not times_s:
            return cls(None, None, None, None)
        in_order = sorted(times_s)
        p50_s, p99_s, p999_s = (round(percentile(in_order, share), 5) for share in (0.5, 0.99, 0.999))
        return cls(p50_s, p99_s, p999_s, round(in_order[-1], 5))


class OverloadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; rates in requests a second, times in seconds.

    Attributes:
        is_passed: goodput, refusals and recovery are within their limits, and nothing failed otherwise.
        goodput_share: of the peak, under overload.
        num_without_retry_after: refusals that did not say when to come back.
        refusals: times to a refusal at the client's socket, which the limit is for.
        refusals_read: the same until this program had read it.
        refused_in_time: share of `refusals` within the limit; 1 if there were none.
        server_refused_in_time: the share by the server's account; None if it gives none. With several edges: of one.
        recovery_s: from the end of the load until answers come as fast as before; None if they never did.
        normal_s: how fast that was, the median of a few requests alone.
        failures: the first few that were neither answered nor refused with 429.
    """

    is_passed: bool
    peak_goodput: float
    offered: float
    goodput: float
    goodput_share: float
    num_answered: int
    num_refused: int
    num_failed: int
    num_without_retry_after: int
    refusals: RefusalTimes
    refusals_read: RefusalTimes
    refused_in_time: float
    server_refused_in_time: float | None
    normal_s: float
    recovery_s: float | None
    failures: list[str]


class _Tally:
    """What became of the requests of one phase."""

    def __init__(self) -> None:
        self.answered_at_s: list[float] = []
        self.refused_s: list[float] = []  # until at the socket
        self.refused_read_s: list[float] = []
        self.num_without_retry_after = 0
        self.num_failed = 0
        self.failures: list[str] = []


def bench_overload(arguments: argparse.Namespace) -> int:
    """Measure, print, and return 0 only if everything is within its limits."""
    report = asyncio.run(_bench(arguments))
    print_overload(report)
    write_json(report, arguments.json)
    return int(not report.is_passed)


async def _bench(arguments: argparse.Namespace) -> OverloadReport:
    client = LeanClient(arguments.base_url, arguments.api_key)
    # What this process made until now stays: its collector need not walk it again while times are taken.
    gc.freeze()
    try:
        load = Load(client, arguments.input_len, arguments.output_len, seed=arguments.workload_seed)
        return await load.measure(
            concurrency=arguments.concurrency,
            peak_s=arguments.peak_s,
            factor=arguments.factor,
            for_s=arguments.for_s,
            is_shown=True,
        )
    finally:
        client.close()


class Load:
    """Requests of one shape, to one server."""

    def __init__(self, client: LeanClient, input_len: int, output_len: int, *, seed: int) -> None:
        self._client = client
        self._input_len = input_len
        self._output_len = output_len
        self._chance = random.Random(seed)  # noqa: S311  # a workload, not a secret

    async def measure(
        self, *, concurrency: int, peak_s: float, factor: float, for_s: float, is_shown: bool = False
    ) -> OverloadReport:
        """All phases, one after the other.

        Raises:
            OctavoError: no server answers, or it answers nothing of what is asked for.
        """
        with tqdm(total=round(peak_s + for_s), desc="seconds", unit="s", disable=not is_shown) as bar:
            normal_s = statistics.median([await self._probe() for _ in range(NUM_PROBES)])
            peak = await self._find_peak(concurrency, peak_s)
            bar.update(round(peak_s))
            tally = _Tally()
            before = await self._server_account()
            began_s = time.monotonic()
            waiting = await self._overload(tally, factor * peak, for_s, bar)
            ended_s = time.monotonic()
            recovery_s = await self._recover(normal_s, ended_s)
            await asyncio.gather(*waiting)
            after = await self._server_account()
        return _report(
            tally,
            began_s=began_s,
            ended_s=ended_s,
            peak=peak,
            normal_s=normal_s,
            recovery_s=recovery_s,
            server_refused_in_time=_share_in_time(before, after),
        )

    def _body(self) -> bytes:
        # Digits that hardly repeat: the prefix cache must not answer for the model.
        digits = f"{self._chance.getrandbits(32 * self._input_len):x}"
        return msgspec.json.encode(
            {
                "prompt": digits,
                "truncate_prompt_tokens": self._input_len,
                "max_tokens": self._output_len,
                "temperature": 0,
                "ignore_eos": True,
            }
        )

    async def _ask(self, tally: _Tally) -> None:
        try:
            answer = await self._client.request("POST", "/v1/completions", self._body())
        except (OSError, OctavoError) as error:
            _fail(tally, f"{type(error).__name__}: {error}")
            return
        if answer.status == 200:
            tally.answered_at_s.append(time.monotonic())
        elif answer.status == 429:
            _note_refusal(tally, answer)
        else:
            _fail(tally, f"status {answer.status}: {answer.body[:200].decode(errors='replace')}")

    async def _server_account(self) -> dict[str, float]:
        """Refusals since the server's start, by the upper bound of their times."""
        try:
            answer = await self._client.request("GET", "/metrics")
        except (OSError, OctavoError):
            return {}
        if answer.status != 200:
            return {}
        return {
            sample.labels["le"]: sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
            if sample.name == "octavo:refusal_seconds_bucket"
        }

    async def _probe(self) -> float:
        """One request; how long it took to be answered, infinity if it was refused."""
        tally = _Tally()
        sent_s = time.monotonic()
        await self._ask(tally)
        if tally.failures:
            raise OctavoError(f"the server does not answer: {tally.failures[0]}")
        return tally.answered_at_s[0] - sent_s if tally.answered_at_s else float("inf")

    async def _find_peak(self, concurrency: int, peak_s: float) -> float:
        tally = _Tally()
        began_s = time.monotonic()
        ends_s = began_s + peak_s

        async def client() -> None:
            while time.monotonic() < ends_s:
                num_answered = len(tally.answered_at_s)
                await self._ask(tally)
                if len(tally.answered_at_s) == num_answered:
                    await asyncio.sleep(PROBE_EVERY_S)  # refused: not in a tight loop

        await asyncio.gather(*(client() for _ in range(concurrency)))
        # The first fifth fills the batch.
        answered = [at_s for at_s in tally.answered_at_s if began_s + 0.2 * peak_s <= at_s < ends_s]
        if not answered:
            raise OctavoError(
                f"no request was answered within {peak_s:g} s: give it longer (--peak-for)"
                + (f"; the first failure: {tally.failures[0]}" if tally.failures else "")
            )
        return len(answered) / (0.8 * peak_s)

    async def _overload(self, tally: _Tally, offered: float, for_s: float, bar: tqdm) -> set[asyncio.Task[None]]:
        """Send at this rate for so long; returns what is not answered by then."""
        waiting: set[asyncio.Task[None]] = set()
        began_s = due_s = time.monotonic()
        while due_s < began_s + for_s:
            due_s += self._chance.expovariate(offered)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            task = asyncio.create_task(self._ask(tally))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
            bar.update(max(0, int(time.monotonic() - began_s) - bar.n + bar.total - round(for_s)))
        return set(waiting)

    async def _recover(self, normal_s: float, ended_s: float) -> float | None:
        """Until a request alone is answered as fast as before the load, give or take its double."""
        while time.monotonic() - ended_s < GIVE_UP_RECOVERY_S:
            sent_s = time.monotonic()
            if await self._probe() <= 2 * normal_s + 0.05:
                return sent_s - ended_s
            await asyncio.sleep(PROBE_EVERY_S)
        return None


def _note_refusal(tally: _Tally, answer: LeanAnswer) -> None:
    tally.refused_read_s.append(answer.head_s)
    tally.refused_s.append(answer.head_s if answer.arrival_s is None else answer.arrival_s)
    tally.num_without_retry_after += not answer.has_retry_after


def _share_in_time(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Of the refusals between two accounts of the server, those within the limit."""
    num = after.get("+Inf", 0.0) - before.get("+Inf", 0.0)
    limit = str(MAX_REFUSAL_S)
    return round((after[limit] - before.get(limit, 0.0)) / num, 5) if num > 0 and limit in after else None


def _fail(tally: _Tally, why: str) -> None:
    tally.num_failed += 1
    if len(tally.failures) < 5:
        tally.failures.append(why)


def _report(
    tally: _Tally,
    *,
    began_s: float,
    ended_s: float,
    peak: float,
    normal_s: float,
    recovery_s: float | None,
    server_refused_in_time: float | None,
) -> OverloadReport:
    # As with the peak, the first fifth does not count; what is answered after the load does not either.
    from_s = began_s + 0.2 * (ended_s - began_s)
    goodput = sum(from_s <= at_s < ended_s for at_s in tally.answered_at_s) / (ended_s - from_s)
    refused = tally.refused_s
    times = RefusalTimes.of(refused)
    num_sent = len(tally.answered_at_s) + len(refused) + tally.num_failed
    is_passed = (
        goodput >= MIN_GOODPUT_SHARE * peak
        and (times.p99_s is None or times.p99_s <= MAX_REFUSAL_S)
        and not tally.num_without_retry_after
        and not tally.num_failed
        and recovery_s is not None
        and recovery_s <= MAX_RECOVERY_S
    )
    return OverloadReport(
        is_passed=is_passed,
        peak_goodput=round(peak, 2),
        offered=round(num_sent / (ended_s - began_s), 2),
        goodput=round(goodput, 2),
        goodput_share=round(goodput / peak, 3),
        num_answered=len(tally.answered_at_s),
        num_refused=len(refused),
        num_failed=tally.num_failed,
        num_without_retry_after=tally.num_without_retry_after,
        refusals=times,
        refusals_read=RefusalTimes.of(tally.refused_read_s),
        refused_in_time=(
            round(sum(time_s <= MAX_REFUSAL_S for time_s in refused) / len(refused), 5) if refused else 1.0
        ),
        server_refused_in_time=server_refused_in_time,
        normal_s=round(normal_s, 4),
        recovery_s=recovery_s if recovery_s is None else round(recovery_s, 2),
        failures=tally.failures,
    )


def print_overload(report: OverloadReport) -> None:
    """A table for a person."""

    def ms(value_s: float | None) -> str:
        return "none" if value_s is None else f"{1e3 * value_s:.1f}"

    table = Table(title="octavo bench overload", title_justify="left", show_header=False)
    table.add_row("peak goodput", f"{report.peak_goodput:.1f} requests/s")
    table.add_row("offered", f"{report.offered:.1f} requests/s")
    table.add_row("goodput", f"{report.goodput:.1f} requests/s, {100 * report.goodput_share:.1f} % of the peak")
    table.add_row("answered / refused / failed", f"{report.num_answered} / {report.num_refused} / {report.num_failed}")
    for where, times in (("at the client's socket", report.refusals), ("read by the client", report.refusals_read)):
        table.add_row(
            f"refusal {where}, p50 / p99 / p99.9 / max",
            " / ".join(map(ms, (times.p50_s, times.p99_s, times.p999_s, times.max_s))) + " ms",
        )
    limit = f"{1e3 * MAX_REFUSAL_S:.0f} ms"
    table.add_row(f"refused within {limit}, at the client's socket", f"{100 * report.refused_in_time:.2f} %")
    if report.server_refused_in_time is not None:
        table.add_row(
            f"refused within {limit}, by the server's account", f"{100 * report.server_refused_in_time:.2f} %"
        )
    table.add_row("refusals without Retry-After", str(report.num_without_retry_after))
    table.add_row(
        "back to normal after",
        "never"
        if report.recovery_s is None
        else f"{report.recovery_s:.1f} s (a request alone: {1e3 * report.normal_s:.0f} ms)",
    )
    table.add_row("verdict", "[green]passed[/]" if report.is_passed else "[red]failed[/]")
    console = Console()
    console.print(table)
    for line in report.failures:
        console.print(f"- {line}", markup=False, highlight=False)
