"""The pages about a plan and about a capacity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..plan.candidate import Candidate
from ..plan.capacity import Capacity
from ..plan.diagnosis import Diagnosis
from ..plan.planner import Finding, Plan
from ..plan.probe import Probe
from ..slo import Slo
from .figures import money, quantity, seconds, share
from .page import Cell, Column, Tone, card, cards, code, note, page, section, table, tiles
from .run_report import WORST_FIRST, load_tone, overload_remark
from .svg import Axis, Reference, Series, chart

_COLOURED_GPUS = 4  # one colour each; all others share the next

FIELDS = {
    "gpu": "GPU",
    "tensor_parallel_size": "TP",
    "max_num_batched_tokens": "tokens a step",
    "max_num_seqs": "seats",
    "block_size": "block",
    "enable_prefix_caching": "prefix cache",
    "memory_utilization": "memory",
    "num_blocks": "KV blocks",
    "routing": "routing",
}
_FOOTER = "simulated with the engine's own scheduler, KV allocator and router; p99 by nearest rank"


def varied_fields(candidates: Sequence[Candidate]) -> list[str]:
    """Fields in which candidates differ; the GPU always."""
    return [
        name
        for name in FIELDS
        if name == "gpu" or len(dict.fromkeys(getattr(candidate, name) for candidate in candidates)) > 1
    ]


def candidate_name(candidate: Candidate, varied: Sequence[str]) -> str:
    """GPU and what sets the candidate apart, in a few words."""
    groups = f"{candidate.tensor_parallel_size} × " if candidate.tensor_parallel_size > 1 else ""
    names = [name for name in varied if name not in ("gpu", "tensor_parallel_size")]
    details = [f"{FIELDS[name]} {getattr(candidate, name)}" for name in names if getattr(candidate, name) is not None]
    return f"{groups}{candidate.gpu}" + (f", {', '.join(details)}" if details else "")


def plan_report(plan: Plan, slo: Slo, *, title: str, serve_command: str, remarks: Sequence[str]) -> str:
    """The whole page, as text of one HTML file.

    Args:
        serve_command: starts one replica of the chosen configuration; empty without one.
        remarks: what must be known beside it.
    """
    varied = varied_fields([finding.candidate for finding in plan.findings])
    body: list[str] = []
    if plan.chosen < 0:
        body.append(note("Infeasible: nothing that was asked for keeps the service level.", "bad"))
    body += [note(remark, "warn") for remark in remarks]
    if plan.chosen >= 0:
        body.append(tiles(_tiles(plan.findings[plan.chosen])))
    if any(finding.passing for finding in plan.findings):
        body.append(section("Cost against latency", _fronts(plan, slo, varied)))
    if plan.curve:
        name = candidate_name(plan.findings[plan.chosen].candidate, varied)
        body.append(section(f"Latency over replicas: {name}", _curves(plan.curve, slo, "replicas", _replicas_of)))
    body.append(section("Candidates", _candidates(plan, varied)))
    if plan.diagnosis is not None:
        body.append(_diagnosis(plan.diagnosis))
    if serve_command:
        body.append(section("Start one replica", code(serve_command)))
    found = sum(finding.verdict == "feasible" for finding in plan.findings)
    subtitle = f"{_slo_text(slo)} — {found} of {len(plan.findings)} configurations keep it"
    return page(title, subtitle, body, _FOOTER)


def capacity_report(capacity: Capacity, slo: Slo, *, title: str) -> str:
    """The whole page, as text of one HTML file."""
    body: list[str] = []
    best = capacity.best
    if best is None:
        body.append(note(f"Capacity 0: {capacity.reason}", "bad"))
    else:
        replicas = f"{capacity.num_replicas} replica{'s' if capacity.num_replicas != 1 else ''}"
        body.append(
            tiles(
                [
                    (f"{capacity.load_multiple:.4g} ×", f"the trace's load on {replicas}, to 1 %", "good"),
                    (f"{quantity(best.goodput_rps)} /s", "requests within the limits", ""),
                    (seconds(best.ttft_s.p99), "p99 time to first token", ""),
                    (seconds(best.tpot_s.p99), "p99 time per output token", ""),
                    (share(best.busy_share), "device busy", ""),
                    (capacity.binding, "keeps more out", ""),
                ]
            )
        )
    if capacity.probes:
        body.append(
            section(
                f"Latency over load: {candidate_name(capacity.candidate, ())}",
                _curves(capacity.probes, slo, "multiple of the trace's load", lambda probe: probe.load_multiple),
            )
        )
        body.append(section("Loads that were simulated to the end", _loads(capacity.probes)))
    if capacity.diagnosis is not None:
        body.append(_diagnosis(capacity.diagnosis))
    return page(title, _slo_text(slo), body, _FOOTER)


def _slo_text(slo: Slo) -> str:
    return ", ".join(f"{term.name.replace('_', ' ')} < {seconds(term.limit_s)}" for term in slo.terms)


def _tiles(finding: Finding) -> list[tuple[str, str, Tone]]:
    best = finding.best
    assert best is not None
    replicas = f"{finding.num_replicas} replica{'s' if finding.num_replicas != 1 else ''}"
    size = finding.candidate.tensor_parallel_size
    return [
        (
            f"{finding.num_gpus} × {finding.candidate.gpu}",
            f"{replicas} of {size} GPU{'s' if size != 1 else ''}: the cheapest that keeps the service level",
            "good",
        ),
        (f"{money(finding.cost_per_hour)} /h", "cost", ""),
        (best.load, f"{share(best.slo_attainment)} of requests within every limit", load_tone(best.load)),
        (seconds(best.ttft_s.p99), "p99 time to first token", ""),
        (seconds(best.tpot_s.p99), "p99 time per output token", ""),
        (finding.binding, f"keeps it from fewer; device busy {share(best.busy_share)}", ""),
    ]


def _fronts(plan: Plan, slo: Slo, varied: Sequence[str]) -> str:
    return cards(
        _front(plan, slo, varied, "ttft", "time to first token"),
        _front(plan, slo, varied, "tpot", "time per output token"),
        least_width=480,
    )


def _front(plan: Plan, slo: Slo, varied: Sequence[str], metric: str, title: str) -> str:
    """Every simulation that keeps the limits, and those of them that nothing beats in cost and this latency."""

    def figure(probe: Probe) -> float:
        value: float = getattr(probe, f"{metric}_s").p99
        return value

    everything = [
        (probe.cost_per_hour, figure(probe), finding.candidate, probe.num_replicas)
        for finding in plan.findings
        for probe in finding.passing
    ]
    gpus = list(dict.fromkeys(finding.candidate.gpu for finding in plan.findings if finding.passing))
    front: list[tuple[float, float]] = []
    for cost, latency, _, _ in sorted(everything, key=lambda one: one[:2]):
        if not front or latency < front[-1][1]:
            front.append((cost, latency))
    chart_series = [Series(name="front", points=front, kind="step", colour=5, is_dashed=True)]
    for place, gpu in enumerate(gpus):
        mine = [one for one in everything if one[2].gpu == gpu]
        chart_series.append(
            Series(
                name=gpu,
                points=[one[:2] for one in mine],
                kind="points",
                colour=min(place, _COLOURED_GPUS),
                notes=[
                    f"{number} replicas of {candidate_name(candidate, varied)}: {money(cost)} /h, {seconds(latency)}"
                    for cost, latency, candidate, number in mine
                ],
            )
        )
    if plan.chosen >= 0:
        chosen = plan.findings[plan.chosen]
        assert chosen.best is not None
        chart_series.append(
            Series(name="chosen", points=[(chosen.cost_per_hour, figure(chosen.best))], kind="ring", colour=2)
        )
    return card(
        f"Cost against p99 {title}",
        "each point is a number of replicas of a candidate that keeps the service level; lower left is better",
        chart(
            chart_series,
            Axis(label="dollars an hour", text=money, lowest=0.0),
            Axis(label=f"p99 {title}", text=seconds, lowest=0.0),
            description=f"Cost an hour against p99 {title}: {len(front)} of {len(everything)} points on the front",
            references=[
                Reference("y", term.limit_s, f"limit {seconds(term.limit_s)}")
                for term in slo.terms
                if term.metric == metric and term.statistic == "p99"
            ],
            height=300,
        ),
    )


def _replicas_of(probe: Probe) -> float:
    return float(probe.num_replicas)


def _curves(probes: Sequence[Probe], slo: Slo, x_label: str, place: Callable[[Probe], float]) -> str:
    boxes = []
    for metric, title in (("ttft", "Time to first token"), ("tpot", "Time per output token"), ("e2e", "End to end")):
        limits = [term for term in slo.terms if term.metric == metric]
        drawn = [
            Series(
                name=name,
                points=[(place(probe), getattr(getattr(probe, f"{metric}_s"), name)) for probe in probes],
                colour=colour,
                notes=[
                    f"{place(probe):.4g} {x_label}: {name} {seconds(getattr(getattr(probe, f'{metric}_s'), name))}, "
                    f"{probe.load}"
                    for probe in probes
                ],
            )
            for colour, name in enumerate(("p50", "p90", "p99"))
        ]
        values = [value for one in drawn for _, value in one.points if value > 0]
        boxes.append(
            card(
                title,
                "p50, p90 and p99; hover over a point for its figures",
                chart(
                    drawn,
                    Axis(label=x_label),
                    Axis(
                        label=title.lower(),
                        text=seconds,
                        is_log=bool(values) and max(values) > 12 * min(values),
                        lowest=None if values and max(values) > 12 * min(values) else 0.0,
                    ),
                    description=f"{title} over {x_label}",
                    references=[
                        Reference("y", term.limit_s, f"{term.statistic} < {seconds(term.limit_s)}") for term in limits
                    ],
                    width=430,
                    height=280,
                ),
            )
        )
    labels = [probe for probe in probes if probe.load != "STABLE"]
    remark = ""
    if labels:
        worst = next(label for label in WORST_FIRST if any(probe.load == label for probe in labels))
        places = ", ".join(f"{place(probe):.4g}" for probe in labels)
        remark = note(f"{x_label.capitalize()} {places}: {overload_remark(worst)}", load_tone(worst))
    return cards(*boxes) + remark


def _candidates(plan: Plan, varied: Sequence[str]) -> str:
    columns = [Column(FIELDS[name], "text") for name in varied]
    columns += [
        Column("replicas"),
        Column("GPUs"),
        Column("$ /h"),
        Column("TTFT p99"),
        Column("TPOT p99"),
        Column("KV peak"),
        Column("verdict", "text"),
        Column("what binds", "long"),
    ]
    order = sorted(
        range(len(plan.findings)),
        key=lambda i: (plan.findings[i].verdict != "feasible", plan.findings[i].cost_per_hour, i),
    )
    rows = []
    front = {index for index, _ in plan.front}
    for i in order:
        finding = plan.findings[i]
        cells = [Cell(_value(getattr(finding.candidate, name))) for name in varied]
        best = finding.best
        if finding.verdict == "feasible" and best is not None:
            verdict = "chosen" if i == plan.chosen else "on the front" if i in front else "meets"
            tone: Tone = "good" if best.load == "STABLE" else "warn"
            cells += [
                Cell(str(finding.num_replicas)),
                Cell(str(finding.num_gpus)),
                Cell(f"{finding.cost_per_hour:.2f}"),
                Cell(seconds(best.ttft_s.p99)),
                Cell(seconds(best.tpot_s.p99)),
                Cell(share(best.kv_use_peak)),
                Cell(verdict if best.load == "STABLE" else f"{verdict}, {best.load}", tone),
                Cell(finding.binding),
            ]
        else:
            cells += [Cell("–")] * 6
            cells += [Cell(finding.verdict, "bad"), Cell(f"{finding.binding}: {finding.reason}")]
        rows.append(("chosen" if i == plan.chosen else "" if finding.verdict == "feasible" else "dim", cells))
    return table(columns, rows)


def _loads(probes: Sequence[Probe]) -> str:
    rows = [
        (
            "" if probe.meets else "dim",
            [
                Cell(f"{probe.load_multiple:.4g}"),
                Cell("meets", "good") if probe.meets else Cell(f"misses {', '.join(probe.missed)}", "bad"),
                Cell(probe.load, load_tone(probe.load)),
                Cell(seconds(probe.ttft_s.p50)),
                Cell(seconds(probe.ttft_s.p99)),
                Cell(seconds(probe.tpot_s.p50)),
                Cell(seconds(probe.tpot_s.p99)),
                Cell(share(probe.kv_use_peak), share=probe.kv_use_peak),
                Cell(share(probe.busy_share), share=probe.busy_share),
            ],
        )
        for probe in probes
    ]
    columns = [Column("load"), Column("verdict", "text"), Column("label", "text")]
    columns += [Column(name) for name in ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "KV peak", "busy")]
    return table(columns, rows)


def _diagnosis(diagnosis: Diagnosis) -> str:
    failing = diagnosis.failing
    replicas = f"{failing.num_replicas} replica{'s' if failing.num_replicas != 1 else ''}"
    text = (
        f"{replicas} at {failing.load_multiple:.4g} times the load: {failing.load}, "
        f"{share(failing.slo_attainment)} of requests within every limit. With more of one thing alone:"
    )
    rows: list[tuple[str, Sequence[Cell]]] = [
        (
            "dim",
            [
                Cell("as it is"),
                Cell(share(failing.slo_attainment), share=failing.slo_attainment),
                Cell(""),
                Cell(seconds(failing.ttft_s.p99)),
                Cell(seconds(failing.tpot_s.p99)),
                Cell("misses", "bad"),
            ],
        )
    ]
    for one in diagnosis.what_ifs:
        attained = one.probe.slo_attainment
        rows.append(
            (
                "",
                [
                    Cell(one.text),
                    Cell(share(attained), share=attained),
                    Cell(f"{100 * one.gain:+.1f} points"),
                    Cell(seconds(one.probe.ttft_s.p99)),
                    Cell(seconds(one.probe.tpot_s.p99)),
                    Cell("enough", "good") if one.meets else Cell("misses", "bad"),
                ],
            )
        )
    columns = [Column("with", "text"), Column("within every limit"), Column("gain")]
    columns += [Column("TTFT p99"), Column("TPOT p99"), Column("verdict", "text")]
    return section(f"What binds: {diagnosis.binding}", f"<p>{text}</p>", table(columns, rows))


def _value(value: object) -> str:
    if value is None:
        return "by memory"
    if isinstance(value, bool):
        return "on" if value else "off"
    return quantity(value) if isinstance(value, int | float) else str(value)
