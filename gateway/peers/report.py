"""What a comparison of engines found out, for a file and for a person."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from ..ceilings import Ceilings, ModelTraffic
from .catalog import OURS
from .workload import Workload


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One engine on one workload.

    Attributes:
        tokens_per_s: median of the rounds.
        low, high: of the rounds.
        ratio: ours over theirs, medians of the same rounds; None for ours and for a failure.
        foreign_cores: processors that others kept busy, median of the rounds.
        same_tokens: share of output tokens that are ours, counted up to each request's first difference.
    """

    engine: str
    workload: str
    tokens_per_s: float
    low: float
    high: float
    ratio: float | None
    rounds: list[float]
    foreign_cores: float
    cpu_s: float
    same_tokens: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found out."""

    model: str
    dtype: str
    num_threads: int
    repeats: int
    workloads: list[Workload]
    cells: list[Cell]
    versions: dict[str, dict[str, str]]
    facts: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    ceilings: Ceilings
    ceiling_tokens_per_s: dict[str, float]


def ceiling_rates(workloads: Sequence[Workload], ceilings: Ceilings, traffic: ModelTraffic | None) -> dict[str, float]:
    """What the machine allows on each workload that is bound by one thing; the mixed one is not."""
    if traffic is None:
        return {}
    rates = {}
    for workload in workloads:
        if workload.kind == "decode":
            prompt, output = workload.lengths[0]
            rates[workload.name] = traffic.decode_ceiling(ceilings, len(workload.lengths), prompt + output / 2)
        elif workload.kind == "prefill":
            rates[workload.name] = traffic.prefill_ceiling(ceilings)
    return rates


def print_report(report: Report, console: Console) -> None:
    """A table for a person: a section for each workload, a row for each engine."""
    cells = {(cell.workload, cell.engine): cell for cell in report.cells}
    table = Table("workload", "engine", title_justify="left")
    for heading in ("tok/s", "from", "to", "ratio", "same"):
        table.add_column(heading, justify="right")
    table.title = (
        f"octavo bench offline --peers: {Path(report.model).name}, {report.dtype}, {report.num_threads} threads, "
        f"medians of {report.repeats} rounds"
    )
    for workload in report.workloads:
        label = workload.name
        for engine in report.versions:
            cell = cells.get((workload.name, engine))
            figures = ("failed", "", "", "", "") if cell is None else _figures(cell)
            table.add_row(label, engine, *figures)
            label = ""
        ceiling, ours = report.ceiling_tokens_per_s.get(workload.name), cells.get((workload.name, OURS))
        if ceiling is not None:
            share = f"{ours.tokens_per_s / ceiling:.2f}x" if ours else ""
            table.add_row("", "(ceiling)", _figure(ceiling), "", "", share, "")
        table.add_section()
    console.print(table)
    console.print("ratio: ours over theirs, or over the ceiling; same: share of their tokens that are ours")
    limits = report.ceilings
    console.print(
        f"ceilings: {limits.read_gb_per_s:.1f} GB/s read ({limits.read_one_stream_gb_per_s:.1f} in one stream), "
        f"{limits.f32_tflop_per_s:.3f} TFLOP/s float32, {limits.bf16_tflop_per_s:.3f} TFLOP/s bfloat16 by torch.mm"
    )
    if foreign := [cell.foreign_cores for cell in report.cells]:
        console.print(f"cores that others kept busy: median {statistics.median(foreign):.2f}, most {max(foreign):.2f}")
    for engine, versions in report.versions.items():
        facts = {key: value for key, value in report.facts[engine].items() if key in _SHOWN_FACTS}
        words = [*(f"{name} {version}" for name, version in versions.items()), *map(str, facts.values())]
        console.print(f"{engine}: {', '.join(words) or 'version unknown'}", markup=False)
    for name, why in report.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)


_SHOWN_FACTS = ("attention", "deterministic", "file", "model", "threads_bound_to")


def _figures(cell: Cell) -> tuple[str, str, str, str, str]:
    return (
        *(_figure(cell.tokens_per_s), _figure(cell.low), _figure(cell.high)),
        "" if cell.ratio is None else f"{cell.ratio:.2f}x",
        "" if cell.same_tokens is None else f"{cell.same_tokens:.0%}",
    )


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
