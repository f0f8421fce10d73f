"""The page about one simulated run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..results import Distribution, ReplicaResult, RequestRecord, RunResult, TimelinePoint
from .figures import money, quantity, seconds, share
from .page import Cell, Column, Tone, card, cards, note, page, section, table, tiles
from .svg import Axis, Reference, Series, chart, peaks, thinned

LATENCIES = (
    ("ttft", "Time to first token", "arrival to the first token sent"),
    ("tpot", "Time per output token", "after the first; a mean for each request"),
    ("e2e", "End to end", "arrival to the last token sent"),
)
_MOST_REPLICAS_SHOWN = 64
WORST_FIRST = ("OVERLOADED", "REFUSING", "BACKLOGGED")
"""Labels of a load of which something must be said."""


def run_report(result: RunResult, records: Sequence[RequestRecord]) -> str:
    """The whole page, as text of one HTML file.

    Args:
        records: of every request of the run; their distributions are drawn.
    """
    body = [
        *_remarks(result),
        tiles(_tiles(result)),
        section(
            "Latency", cards(*(_distribution_card(result, records, *one) for one in LATENCIES)), _latencies(result)
        ),
        section("Over time", _timelines(result.timeline)),
        section(_replica_heading(result.replicas), _replicas(result.replicas)),
        section("What was simulated", _settings(result)),
    ]
    replicas = f"{len(result.replicas)} replica{'s' if len(result.replicas) != 1 else ''}"
    subtitle = f"{quantity(result.num_requests)} requests over {seconds(result.duration_s)} on {replicas}, simulated"
    return page(f"Simulation of {result.workload}", subtitle, body, f"event log SHA-256 {result.event_log_sha256}")


def overload_remark(load: str) -> str | None:
    """What must be said beside the percentiles of a run that did not keep up; None of one that did."""
    if load == "OVERLOADED":
        return (
            "OVERLOADED: the queue never drained while requests came. The percentiles measure how long the trace is, "
            "not what this configuration does."
        )
    if load == "REFUSING":
        return (
            "REFUSING: the queue stayed short because requests were turned away, or waited in vain. The percentiles "
            "are of those that were served."
        )
    if load == "BACKLOGGED":
        return "BACKLOGGED: the queue grew over the run. On a longer trace the percentiles would be worse."
    return None


def refusals_text(result: RunResult) -> str:
    """How many were refused for which reason; empty if none was."""
    reasons = result.refused_because.items()
    return ", ".join(f"{quantity(number)} refused: {code.replace('_', ' ')}" for code, number in reasons)


def load_tone(load: str) -> Tone:
    """The colour of a load's label."""
    return {"STABLE": "good", "BACKLOGGED": "warn"}.get(load, "bad")  # type: ignore[return-value]  # one of Tone's


def _remarks(result: RunResult) -> list[str]:
    remarks = []
    overload = overload_remark(result.load)
    if overload:
        remarks.append(note(overload, load_tone(result.load)))
    if result.extrapolated_share > 0:
        remarks.append(
            note(
                f"{share(result.extrapolated_share)} of the steps lie outside what the step-time model was measured "
                "on: their times are extrapolated.",
                "warn",
            )
        )
    return remarks


def _tiles(result: RunResult) -> list[tuple[str, str, Tone]]:
    unsaid = result.load in ("OVERLOADED", "REFUSING")
    shown: list[tuple[str, str, Tone]] = [(result.load, "load", load_tone(result.load))]
    if result.slo:
        shown.append(
            (
                "met" if result.slo_met else "missed",
                f"{_slo_text(result)}; {share(result.slo_attainment)} of requests within every limit",
                "good" if result.slo_met else "bad",
            )
        )
    shown += [
        (seconds(result.ttft_s.p99), "p99 time to first token", "bad" if unsaid else ""),
        (seconds(result.tpot_s.p99), "p99 time per output token", "bad" if unsaid else ""),
        (seconds(result.e2e_s.p99), "p99 end to end", "bad" if unsaid else ""),
        (
            f"{quantity(result.goodput_rps)} /s",
            "goodput: requests done" + (" within the limits" if result.slo else ""),
            "",
        ),
        (
            f"{quantity(result.output_token_rate)} /s",
            f"output tokens; {quantity(result.prompt_token_rate)} /s of prompts",
            "",
        ),
        (share(result.kv_use_peak), f"peak KV use; {share(result.kv_use_mean)} on average", ""),
        (share(result.prefix_hit_rate), "of prompt tokens from the prefix cache", ""),
        (
            quantity(result.num_preemptions),
            f"preemptions; {quantity(result.num_recomputed_tokens)} tokens recomputed",
            "",
        ),
    ]
    lost = result.num_requests - result.num_done
    reasons = refusals_text(result)
    text = f"requests done; {quantity(lost)} not" + (f", {reasons}" if reasons else "")
    shown.append((quantity(result.num_done), text, "" if lost == 0 else "warn"))
    if result.cost_per_hour > 0:
        per_million = money(result.cost_per_million_output_tokens)
        shown.append((f"{money(result.cost_per_hour)} /h", f"cost; {per_million} per million output tokens", ""))
    return shown


def _slo_text(result: RunResult) -> str:
    return ", ".join(f"{name.replace('_', ' ')} < {seconds(limit)}" for name, limit in result.slo.items())


def _distribution_card(result: RunResult, records: Sequence[RequestRecord], metric: str, title: str, text: str) -> str:
    values = sorted(
        value
        for value in (_figure(record, metric) for record in records if record.outcome == "done")
        if not math.isnan(value)
    )
    figures: Distribution = getattr(result, f"{metric}_s")
    limits = [
        Reference("x", limit, f"{name.split('_')[1]} < {seconds(limit)}")
        for name, limit in result.slo.items()
        if name.split("_")[0] == metric
    ]
    drawing = chart(
        [Series(name=title, points=thinned(values), kind="line", colour=0)],
        Axis(label=title.lower(), text=seconds, is_log=_spans_decades(values)),
        Axis(label="share of requests", text=share, lowest=0.0, highest=1.0),
        description=f"Cumulative distribution of {title.lower()}: "
        f"p50 {seconds(figures.p50)}, p99 {seconds(figures.p99)}",
        references=limits,
        width=430,
        height=250,
    )
    return card(
        title, f"{text} — p50 {seconds(figures.p50)}, p90 {seconds(figures.p90)}, p99 {seconds(figures.p99)}", drawing
    )


def _figure(record: RequestRecord, metric: str) -> float:
    value: float = getattr(record, f"{metric}_s")
    return value


def _spans_decades(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and positive[-1] > 20 * positive[0]


def _latencies(result: RunResult) -> str:
    columns = [Column("", "text"), *(Column(name) for name in ("mean", "p50", "p90", "p95", "p99", "max"))]
    rows: list[tuple[str, Sequence[Cell]]] = []
    for title, figures in (
        ("Time to first token", result.ttft_s),
        ("Time per output token", result.tpot_s),
        ("Between two tokens", result.itl_s),
        ("End to end", result.e2e_s),
        ("Wait before the first step", result.queue_s),
    ):
        values = (figures.mean, figures.p50, figures.p90, figures.p95, figures.p99, figures.max)
        rows.append(("", [Cell(title), *(Cell(seconds(value)) for value in values)]))
    return f'<div style="margin-top:14px">{table(columns, rows)}</div>'


def _timelines(timeline: Sequence[TimelinePoint]) -> str:
    unit, per_unit = ("min", 60.0) if timeline and timeline[-1].time_s > 240 else ("s", 1.0)

    def drawn(title: str, text: str, colour: int, values: list[float], y: Axis) -> str:
        points = [(point.time_s / per_unit, value) for point, value in zip(timeline, values, strict=True)]
        drawing = chart(
            [Series(name=title, points=peaks(points), kind="area", colour=colour)],
            Axis(label=f"virtual time, {unit}", lowest=0.0),
            y,
            description=f"{title} over time, at most {max(values, default=0.0):.4g}",
            width=1160,
            height=165,
        )
        return card(title, text, drawing)

    return cards(
        drawn(
            "Queue",
            "requests that wait for their first step, over all replicas",
            1,
            [float(point.num_waiting) for point in timeline],
            Axis(label="requests", lowest=0.0),
        ),
        drawn(
            "Running batch",
            "requests that hold KV blocks, over all replicas",
            0,
            [float(point.num_running) for point in timeline],
            Axis(label="requests", lowest=0.0),
        ),
        drawn(
            "KV use",
            "held blocks of all blocks",
            2,
            [point.kv_use for point in timeline],
            Axis(label="share", text=share, lowest=0.0),
        ),
        least_width=900,
    )


def _replica_heading(replicas: Sequence[ReplicaResult]) -> str:
    if len(replicas) > _MOST_REPLICAS_SHOWN:
        return f"Replicas (the {_MOST_REPLICAS_SHOWN} busiest of {len(replicas)})"
    return "Replicas"


def _replicas(replicas: Sequence[ReplicaResult]) -> str:
    shown = sorted(range(len(replicas)), key=lambda i: (-replicas[i].busy_share, i))[:_MOST_REPLICAS_SHOWN]
    rows: list[tuple[str, Sequence[Cell]]] = []
    for i in sorted(shown):
        one = replicas[i]
        rows.append(
            (
                "",
                [
                    Cell(str(i)),
                    Cell(quantity(one.num_requests)),
                    Cell(share(one.busy_share), share=one.busy_share),
                    Cell(quantity(one.mean_batch)),
                    Cell(share(one.kv_use_peak), "warn" if one.kv_use_peak > 0.99 else "", one.kv_use_peak),
                    Cell(quantity(one.num_preemptions), "warn" if one.num_preemptions else ""),
                    Cell(quantity(one.num_steps)),
                    Cell(share(one.num_steps_skipped / one.num_steps) if one.num_steps else "–"),
                ],
            )
        )
    headings = (
        "replica", "requests", "busy", "mean batch", "KV peak", "preemptions", "steps", "fast-forwarded",
    )  # fmt: skip
    return table([Column(heading) for heading in headings], rows)


def _settings(result: RunResult) -> str:
    rows: list[tuple[str, Sequence[Cell]]] = []
    for group, entries in (("engine", result.config), ("step time", result.step_time), ("workload", result.counts)):
        rows += [("", [Cell(group), Cell(name), Cell(_plain(value))]) for name, value in entries.items()]
    return table([Column("", "text"), Column("setting", "text"), Column("value", "long")], rows)


def _plain(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return quantity(value) if math.isfinite(value) and abs(value) < 1e15 else str(value)
