"""What simulations found, as tables for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...sim.plan.capacity import Capacity
from ...sim.plan.diagnosis import Diagnosis
from ...sim.plan.planner import Finding, Plan
from ...sim.report.figures import money, quantity, seconds, share
from ...sim.report.plan_report import FIELDS, candidate_name, varied_fields
from ...sim.report.run_report import overload_remark, refusals_text
from ...sim.results import Distribution, RunResult
from ...sim.workload.summary import WorkloadSummary

_PIPED_WIDTH = 120
_COLOURS = {"STABLE": "green", "BACKLOGGED": "yellow"}


def console_of() -> Console:
    """As wide as the terminal; what is piped has room for whole tables."""
    is_fitted = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_fitted else _PIPED_WIDTH, highlight=False)


def load_label(load: str) -> str:
    """The label of a load, in its colour."""
    return f"[bold {_COLOURS.get(load, 'red')}]{load}[/]"


def print_run(result: RunResult) -> None:
    """Percentiles, and what stands behind them. The load's label stands first."""
    console = console_of()
    replicas = f"{len(result.replicas)} replica{'s' if len(result.replicas) != 1 else ''}"
    console.print(f"[bold]{escape(result.workload)}[/] on {replicas}: {load_label(result.load)}")
    table = Table("", *("mean", "p50", "p90", "p95", "p99", "max"), box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, figures in (
        ("TTFT", result.ttft_s),
        ("TPOT", result.tpot_s),
        ("ITL", result.itl_s),
        ("end to end", result.e2e_s),
        ("queue wait", result.queue_s),
    ):
        table.add_row(name, *_distribution(figures))
    console.print(table)
    remark = overload_remark(result.load)
    if remark:
        console.print(f"[{_COLOURS.get(result.load, 'red')}]{remark}[/]")
    lost = {
        "cancelled": result.num_cancelled,
        "timed out": result.num_timeout,
        "failed": result.num_failed,
    }
    others = "".join(f", {quantity(number)} {name}" for name, number in lost.items() if number)
    others += f", {refusals_text(result)}" if result.refused_because else ""
    facts = [
        ("requests", f"{quantity(result.num_done)} of {quantity(result.num_requests)} done{others}"),
        ("duration", f"{seconds(result.duration_s)} of virtual time"),
        (
            "throughput",
            f"{quantity(result.request_rate)} requests/s, {quantity(result.prompt_token_rate)} prompt and "
            f"{quantity(result.output_token_rate)} output tokens/s",
        ),
    ]
    if result.slo:
        limits = ", ".join(f"{name} < {seconds(limit)}" for name, limit in result.slo.items())
        verdict = "[green]met[/]" if result.slo_met else "[red]missed[/]"
        facts.append(
            (
                "service level",
                f"{limits}: {verdict}; {share(result.slo_attainment)} of requests within every limit, goodput "
                f"{quantity(result.goodput_rps)} requests/s",
            )
        )
    facts += [
        ("KV cache", f"{share(result.kv_use_mean)} on average, {share(result.kv_use_peak)} at the peak"),
        (
            "preemptions",
            f"{quantity(result.num_preemptions)}, {quantity(result.num_recomputed_tokens)} tokens recomputed",
        ),
        ("prefix cache", f"{share(result.prefix_hit_rate)} of prompt tokens"),
        ("device", f"busy {share(result.busy_share)}"),
        (
            "cost",
            f"{money(result.cost_per_hour)} an hour, {money(result.cost_per_million_output_tokens)} per million output "
            "tokens",
        ),
        (
            "steps",
            f"{quantity(result.num_steps)}, {quantity(result.num_steps_skipped)} of them fast-forwarded"
            + (
                f"; [yellow]{share(result.extrapolated_share)} outside what the step-time model was measured on[/]"
                if result.extrapolated_share
                else ""
            ),
        ),
        ("event log", f"sha256 {result.event_log_sha256}"),
    ]
    print_facts(console, facts)
    skipped = [
        f"{quantity(number)} {escape(reason)}" for reason, number in result.counts.items() if ":" in reason and number
    ]
    if skipped:
        console.print(f"[dim]of the trace: {'; '.join(skipped)}[/]")


def print_plan(plan: Plan, *, serve_command: str, remarks: Sequence[str]) -> None:
    """All candidates with their verdicts, the chosen one, and what binds."""
    console = console_of()
    varied = varied_fields([finding.candidate for finding in plan.findings])
    table = Table(
        "",
        *(FIELDS[name] for name in varied),
        *("replicas", "$/h", "TTFT p99", "TPOT p99", "KV peak", "verdict", "binds"),
        title="candidates",
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
    )
    front = {index for index, _ in plan.front}
    for i, finding in enumerate(plan.findings):
        mark = "[green]>[/]" if i == plan.chosen else "*" if i in front else ""
        table.add_row(mark, *_finding_row(finding, varied), style="bold" if i == plan.chosen else None)
    console.print(table)
    console.print("[dim]> the cheapest   * on the Pareto front of cost, TTFT p99 and TPOT p99[/]")
    for finding in plan.findings:
        if finding.verdict != "feasible" and finding.reason:
            console.print(f"[dim]{escape(candidate_name(finding.candidate, varied))}:[/] {escape(finding.reason)}")
    if plan.chosen < 0:
        console.print("[bold red]infeasible:[/] nothing that was asked for meets the service level")
    else:
        chosen = plan.findings[plan.chosen]
        best = chosen.best
        assert best is not None
        console.print(
            f"[bold green]{_count(chosen.num_replicas, 'replica')}[/] of "
            f"{escape(candidate_name(chosen.candidate, varied))}: {money(best.cost_per_hour)} an hour, "
            f"{load_label(best.load)}, {share(best.slo_attainment)} of requests within every limit"
        )
        console.print(f"each: [cyan]{escape(serve_command)}[/]", soft_wrap=True)
    if plan.diagnosis is not None:
        _print_diagnosis(console, plan.diagnosis)
    for remark in remarks:
        console.print(f"[yellow]{escape(remark)}[/]")


def print_capacity(capacity: Capacity, remarks: Sequence[str]) -> None:
    """The highest load, and what happens on the way there."""
    console = console_of()
    if capacity.best is None:
        console.print(f"[bold red]capacity 0:[/] {escape(capacity.reason)} (binding: {capacity.binding})")
    else:
        console.print(
            f"capacity: [bold green]{capacity.load_multiple:.4g}[/] times the trace's load on "
            f"{_count(capacity.num_replicas, 'replica')}, to 1 %; more is kept out by {capacity.binding}"
        )
    table = Table(
        *("load", "verdict", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "KV peak", "busy", "label"),
        title="loads that were simulated to the end",
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
    )
    for probe in capacity.probes:
        table.add_row(
            f"{probe.load_multiple:.4g}",
            "[green]meets[/]" if probe.meets else f"[red]misses {', '.join(probe.missed)}[/]",
            seconds(probe.ttft_s.p50),
            seconds(probe.ttft_s.p99),
            seconds(probe.tpot_s.p50),
            seconds(probe.tpot_s.p99),
            share(probe.kv_use_peak),
            share(probe.busy_share),
            load_label(probe.load),
        )
    if capacity.probes:
        console.print(table)
    if capacity.diagnosis is not None:
        _print_diagnosis(console, capacity.diagnosis)
    for remark in remarks:
        console.print(f"[yellow]{escape(remark)}[/]")


def print_summary(summary: WorkloadSummary) -> None:
    """What a workload is like."""
    console = console_of()
    console.print(f"[bold]{escape(summary.name)}[/]")
    table = Table("tokens", "sum", "mean", "min", "p50", "p90", "p99", "max", box=SIMPLE_HEAD)
    for name, lengths in (("prompt", summary.prompt), ("output", summary.output)):
        table.add_row(
            name,
            *(
                quantity(value)
                for value in (
                    lengths.total, lengths.mean, lengths.min, lengths.p50, lengths.p90, lengths.p99, lengths.max,
                )
            ),
        )  # fmt: skip
    console.print(table)
    facts = [
        ("requests", f"{quantity(summary.num_requests)} in {seconds(summary.span_s)}"),
        ("rate", f"{quantity(summary.request_rate)} a second"),
        (
            "busiest minute",
            f"{quantity(summary.busiest_minute_requests)} requests, from {summary.busiest_minute_begin_s:.0f} s",
        ),
        ("shared prefixes", f"{share(summary.shareable_prompt_share)} of prompt tokens, with an unlimited cache"),
    ]
    if summary.num_sessions:
        facts.append(("conversations", quantity(summary.num_sessions)))
    for title, counted in (("left out", summary.counts.num_skipped), ("changed", summary.counts.num_changed)):
        facts += [(title, f"{quantity(number)} {escape(reason)}") for reason, number in counted.items() if number]
    print_facts(console, facts)


def _finding_row(finding: Finding, varied: Sequence[str]) -> list[str]:
    values = [str(getattr(finding.candidate, name)) for name in varied]
    best = finding.best
    if finding.verdict != "feasible" or best is None:
        return [*values, "–", "–", "–", "–", "–", f"[red]{finding.verdict}[/]", finding.binding]
    return [
        *values,
        str(finding.num_replicas),
        f"{finding.cost_per_hour:.2f}",
        seconds(best.ttft_s.p99),
        seconds(best.tpot_s.p99),
        share(best.kv_use_peak),
        "[green]meets[/]" if best.load == "STABLE" else f"[yellow]meets, {best.load}[/]",
        finding.binding,
    ]


def _print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    failing = diagnosis.failing
    table = Table(
        *("with", "within every limit", "gain", "TTFT p99", "TPOT p99", "enough"),
        title=f"what binds: [bold]{diagnosis.binding}[/] ({_count(failing.num_replicas, 'replica')} at "
        f"{failing.load_multiple:.4g} times the load, {load_label(failing.load)})",
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
    )
    table.add_row(
        "as it is", share(failing.slo_attainment), "", seconds(failing.ttft_s.p99), seconds(failing.tpot_s.p99), "no"
    )
    for one in diagnosis.what_ifs:
        table.add_row(
            one.text,
            share(one.probe.slo_attainment),
            f"{100 * one.gain:+.1f} points",
            seconds(one.probe.ttft_s.p99),
            seconds(one.probe.tpot_s.p99),
            "[green]yes[/]" if one.meets else "no",
        )
    console.print(table)


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Names and what they are, two columns."""
    grid = Table.grid(padding=(0, 2))
    for name, text in facts:
        grid.add_row(f"[dim]{name}[/]", text)
    console.print(grid)


def _distribution(figures: Distribution) -> list[str]:
    return [seconds(value) for value in (figures.mean, figures.p50, figures.p90, figures.p95, figures.p99, figures.max)]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
