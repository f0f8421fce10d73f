"""What `octavo chaos` found, for a person and for a program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from ...actors.runtime.percentile import percentile


class Stall(msgspec.Struct, frozen=True):
    """Longest silences between two chunks of the streams that were open at a fault; seconds."""

    num_streams: int
    p50_s: float | None
    p99_s: float | None
    max_s: float | None


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run.

    Attributes:
        is_passed: all faults were delivered, all streams finished, all of those identical.
        num_started, num_finished, num_identical: streams of the run with faults.
        num_unstable_recipes: requests whose answers differed between two runs without any fault. The model's arithmetic
            depends on the batch then, and no recovery can be judged by them.
        faults: delivered, by victim and kind, as `executor KILL`.
        num_resumed, num_asked_anew: streams that were taken up by their last event's id, and those that had no event
            yet and were asked for again, after their edge was killed.
        restarts: of each actor, by the server's metrics.
        num_requeued, num_dropped_messages, num_quarantined: by the server's metrics.
        failures: the first few streams that did not finish or were not identical, and why.
        problems: faults that could not be delivered, recoveries that did not happen.
    """

    is_passed: bool
    seed: int
    duration_s: float
    num_started: int
    num_finished: int
    num_identical: int
    num_recipes: int
    num_unstable_recipes: int
    num_faults_asked: int
    num_faults: int
    faults: dict[str, int]
    stall: Stall
    restarts: dict[str, int]
    num_requeued: int
    num_dropped_messages: int
    num_quarantined: int
    failures: list[str]
    problems: list[str]
    num_resumed: int = 0
    num_asked_anew: int = 0


def stall_of(gaps_s: Sequence[float]) -> Stall:
    """Summarise; nothing is said of nothing."""
    if not gaps_s:
        return Stall(0, None, None, None)
    ordered = sorted(gaps_s)
    return Stall(
        len(ordered),
        *(round(value, 4) for value in (percentile(ordered, 0.5), percentile(ordered, 0.99), ordered[-1])),
    )


def print_report(report: ChaosReport) -> None:
    """A table for a person."""
    console = Console()
    table = Table(title=f"octavo chaos, seed {report.seed}", title_justify="left", show_header=False)
    table.add_row("faults", _counts(report.faults) or "none")
    table.add_row("streams", str(report.num_started))
    table.add_row("finished", _share(report.num_finished, report.num_started))
    table.add_row("identical", _share(report.num_identical, report.num_started))
    if report.stall.max_s is not None:
        table.add_row(
            "stall p50 / p99 / max",
            " / ".join(
                f"{value or 0.0:.2f} s" for value in (report.stall.p50_s, report.stall.p99_s, report.stall.max_s)
            ),
        )
    table.add_row("restarts (by /metrics)", _counts(report.restarts) or "none")
    table.add_row("requests put back", str(report.num_requeued))
    table.add_row("messages dropped", str(report.num_dropped_messages))
    table.add_row("requests quarantined", str(report.num_quarantined))
    if report.num_resumed or report.num_asked_anew:
        table.add_row("taken up / asked anew", f"{report.num_resumed} / {report.num_asked_anew}")
    table.add_row("time", f"{report.duration_s:.1f} s")
    table.add_row("verdict", "[green]passed[/]" if report.is_passed else "[red]failed[/]")
    console.print(table)
    for line in (*report.problems, *report.failures):
        console.print(f"- {line}", markup=False, highlight=False)
    if report.num_unstable_recipes:
        console.print(
            f"{report.num_unstable_recipes} of {report.num_recipes} requests were answered differently without any "
            "fault: the model's arithmetic depends on the batch. Start the server with --deterministic."
        )


def _share(part: int, whole: int) -> str:
    return f"{part} ({math.floor(10_000 * part / whole) / 100 if whole else 0:.2f} %)"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()) if count)
