"""`octavo sim replay`: a journal run again, a moment of it, a request's waiting, or two journals compared."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...messages.errors import InvalidConfigError
from .progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from ...sim.journal.diff import DiffReport, Side
    from ...sim.journal.replay import ReplayReport

DIFFERENT = 1  # exit status of a replay or comparison that found a difference
_MOST_REQUESTS_SHOWN = 40


def sim_replay(arguments: argparse.Namespace) -> int:
    """Replay or compare; status 1 says that something differs."""
    if arguments.diff is not None:
        return _diff(arguments)
    for name in ("until", "why"):
        value = getattr(arguments, name)
        if value is not None and value < 0:
            raise InvalidConfigError(f"--{name} is {value}, but must be from 0 up", field=name)
    paths = _journals_in(arguments.journal)
    if len(paths) > 1 and (arguments.until is not None or arguments.why is not None):
        raise InvalidConfigError(
            f"--until and --why are about one journal, but there are several: {', '.join(paths)}", field="journal"
        )
    reports: list[ReplayReport] = []
    for path in paths:
        report = _replay(path, arguments)
        reports.append(report)
        if not arguments.json:
            _print_replay(report, shows_state=arguments.until is not None, asked=arguments.why)
    if arguments.json:
        _print_json(reports if Path(arguments.journal).is_dir() else reports[0])
    return 0 if all(report.is_identical for report in reports) else DIFFERENT


def _replay(path: str, arguments: argparse.Namespace) -> ReplayReport:
    from ...sim.journal.replay import replay

    with progress_bar("replaying", "msg") as bar:
        return replay(path, until=arguments.until, why=arguments.why, progress=lambda done: bar.show(done, 0))


def _journals_in(path: str) -> list[str]:
    """A journal, or those in the folder of `--journal`: one of each engine that there was, the oldest first.

    Raises:
        InvalidConfigError: a folder without any.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [path]
    found = [file for file in folder.iterdir() if file.name.startswith("engine") and ".journal" in file.name]
    if not found:
        raise InvalidConfigError(f"there is no journal of an engine in {path}", field="journal")
    return [str(file) for file in sorted(found, key=lambda file: (file.stat().st_mtime_ns, file.name))]


def _diff(arguments: argparse.Namespace) -> int:
    from ...sim.journal.diff import diff

    if arguments.until is not None or arguments.why is not None:
        raise InvalidConfigError("--diff compares whole journals: leave out --until and --why", field="diff")
    report = diff(arguments.journal, arguments.diff)
    if arguments.json:
        _print_json(report)
    else:
        _print_diff(report)
    return 0 if report.is_same else DIFFERENT


def _print_json(report: msgspec.Struct | list[ReplayReport]) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")


def _print_replay(report: ReplayReport, *, shows_state: bool, asked: int | None) -> None:
    from rich.markup import escape

    from .tables import console_of, print_facts

    console = console_of()
    console.print(
        "[bold green]identical:[/] every decision is the recorded one"
        if report.is_identical
        else "[bold red]different:[/] a decision came out otherwise"
    )
    ends = ", ".join(f"{number:,} {reason}" for reason, number in report.ends.items())
    facts = [
        ("journal", f"{escape(report.path)}, {escape(report.model)}, octavo {escape(report.octavo)}"),
        ("began", escape(report.started_at)),
        ("covers", f"{report.duration_s:.1f} s, {report.num_requests:,} requests, {report.num_output_tokens:,} tokens"),
        ("messages", f"{report.num_messages:,}, {report.num_decisions:,} of them decisions"),
        ("compared", f"{report.num_plans:,} plans, {report.num_placements:,} placements, {report.num_ends:,} ends"),
        ("ends", ends or "none"),
        (
            "with",
            f"{report.num_preemptions:,} preemptions, {report.num_prefix_hits:,} prefix hits, "
            f"{report.num_cancels:,} cancels, {report.num_timeouts:,} timeouts, "
            f"{report.num_executor_losses:,} losses of the executor",
        ),
    ]
    if report.raised:
        facts.append(("ended by", escape(report.raised)))
    if report.end is None:
        facts.append(("read", "not to its end"))
    elif not report.end.is_complete:
        facts.append(("incomplete", escape(report.end.why)))
    print_facts(console, facts)
    if report.divergence is not None:
        one = report.divergence
        console.print(
            f"[bold]first difference[/] at message {one.message:,} (frame {one.frame:,}), after step {one.step}, "
            f"{one.time_s:.3f} s, in the {one.core.replace('_', ' ')}:"
        )
        console.print(f"  heard     {escape(one.heard)}", soft_wrap=True)
        for said in one.replayed or ("nothing",):
            console.print(f"  replayed  {escape(said)}", soft_wrap=True)
        console.print(f"  recorded  {escape(one.recorded)}", soft_wrap=True)
    if shows_state:
        _print_state(console, report)
    if asked is not None:
        _print_waiting(console, report, asked)


def _print_state(console: Console, report: ReplayReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    state = report.state
    console.print(f"[bold]after step {state.step}[/], {state.time_s:.3f} s, in flight: {list(state.steps_in_flight)}")
    for line in (state.last_plan, state.last_placement):
        if line:
            console.print(f"  {escape(line)}", soft_wrap=True)
    table = Table(
        *("request", "state", "priority", "prompt", "tokens", "computed", "blocks", "promised", "preempted"),
        box=SIMPLE_HEAD,
    )
    for one in state.requests[:_MOST_REQUESTS_SHOWN]:
        table.add_row(
            str(one.request_id),
            one.state,
            *(
                f"{number:,}"
                for number in (
                    one.priority,
                    one.num_prompt_tokens,
                    one.num_tokens,
                    one.num_computed_tokens,
                    one.num_blocks,
                    one.num_promised_blocks,
                    one.num_preemptions,
                )
            ),
        )
    console.print(table)
    if len(state.requests) > _MOST_REQUESTS_SHOWN:
        console.print(f"[dim]and {len(state.requests) - _MOST_REQUESTS_SHOWN:,} more; --json has them all[/]")


def _print_waiting(console: Console, report: ReplayReport, request_id: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    if not report.waited:
        console.print(f"request {request_id} was part of every step while it was there")
        return
    table = Table(
        *("steps", "number", "from", "to", "waited for", "because"),
        title=f"why request {request_id} waited",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    for span in report.waited:
        steps = f"{span.first_step}-{span.last_step}" if span.num_steps else "none planned"
        details = dict.fromkeys((span.first_detail, span.last_detail))
        table.add_row(
            steps,
            str(span.num_steps),
            f"{span.begin_s:.3f} s",
            f"{span.end_s:.3f} s",
            span.constraint,
            escape(" … ".join(details)),
        )
    console.print(table)


def _print_diff(report: DiffReport) -> None:
    from rich.markup import escape

    from .tables import console_of

    console = console_of()
    if report.is_same:
        console.print(f"[bold green]the same:[/] {report.num_same:,} messages")
        return
    for name, (left, right) in report.config.items():
        console.print(f"[bold red]configuration:[/] {name} is {escape(left)} and {escape(right)}")
    if report.left is not None and report.right is not None:
        console.print(
            f"[bold red]first difference[/] after {report.num_same:,} equal messages"
            + (f", {report.kind} by the {report.core.replace('_', ' ')}" if report.core else "")
        )
        for path, side in ((report.left_path, report.left), (report.right_path, report.right)):
            console.print(f"  {escape(path)}{_place(side)}: {escape(side.message or 'ends here')}", soft_wrap=True)
            if side.trouble:
                console.print(f"    {escape(side.trouble)}", soft_wrap=True)
    if not report.has_compared_tokens:
        console.print("[dim]token ids were not compared: one journal has them and the other has not, or keys differ[/]")


def _place(side: Side) -> str:
    return f" (frame {side.frame:,}, after step {side.step}, {side.time_s:.3f} s)" if side.frame >= 0 else ""
