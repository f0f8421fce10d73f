"""One measured figure, its share of the roofline, and how a list of them is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .ceilings import H200_NOTED, Ceilings

OURS = "octavo"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure.

    Attributes:
        section: `ceilings`, `kernels`, `steps` or `workload`; `-` of what is no figure.
        what: the kernel, the step or the workload.
        shape: at which sizes.
        engine: whose it is.
        ms: time, the median; 0 if it could not be measured.
        low_ms, high_ms: about a tenth of the repeats was faster, and a tenth slower; 0 where that is not known.
        floor_ms: least time by the measured ceilings; 0 where there is none to compare with.
        figure: what is usually quoted: `3.91 TB/s`, `27,400 tok/s`.
        note: why there is no time, or what else to know.
        values: other figures by name, in the units that their names end with.
    """

    section: str
    what: str
    shape: str
    engine: str = OURS
    ms: float = 0.0
    low_ms: float = 0.0
    high_ms: float = 0.0
    floor_ms: float = 0.0
    figure: str = ""
    note: str = ""
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Of the roofline, 0 to 1."""
        return self.floor_ms / self.ms if self.ms > 0 and self.floor_ms > 0 else None


def kernel_row(found: Mapping[str, Any], ceilings: Ceilings | None, *, section: str = "kernels") -> Row:
    """A row of what a kernel's benchmark said.

    Args:
        found: `kernel`, `shape`, `us` (or `ms`; so too `low_us`, `high_us`), and where they mean something `bytes`,
            `flops`, `engine`, `note`; `flops_at_16_bits`: as many as would take the least time, where fewer bits are
            multiplied quicker.
        ceilings: measured before; None while they are being measured.

    Raises:
        KeyError: `kernel` is missing.
    """
    ms = _ms(found, "")
    num_bytes, flops = float(found.get("bytes") or 0), float(found.get("flops") or 0)
    floor_ms = 0.0
    if ceilings is not None:
        bound_flops = float(found.get("flops_at_16_bits") or flops)
        floor_ms = max(num_bytes / ceilings.read_bytes_per_s, bound_flops / ceilings.flops) * 1e3
    return Row(
        section=section,
        what=str(found["kernel"]),
        shape=str(found.get("shape", "")),
        engine=str(found.get("engine") or OURS),
        ms=ms,
        low_ms=_ms(found, "low_"),
        high_ms=_ms(found, "high_"),
        floor_ms=floor_ms,
        figure=rate_of(num_bytes, flops, ms),
        note=str(found.get("note") or ""),
        values={"tflops": flops / ms / 1e9} if flops and ms > 0 else {},
    )


def _ms(found: Mapping[str, Any], which: str) -> float:
    """Of a row that has it in milliseconds or microseconds; 0 where it has not."""
    return float(found[f"{which}ms"]) if f"{which}ms" in found else float(found.get(f"{which}us") or 0.0) / 1e3


def rate_of(num_bytes: float, flops: float, ms: float) -> str:
    """The rate that the larger part of the work ran at."""
    if ms <= 0:
        return ""
    if flops and flops > 100 * num_bytes:  # far beyond any GPU's ridge, or near it: the matrix units bind
        return f"{flops / ms / 1e9:,.0f} TFLOP/s"
    return f"{num_bytes / ms / 1e9:,.2f} TB/s" if num_bytes else ""


def ceilings_of(found: Iterable[Mapping[str, Any]], gpu: str) -> Ceilings:
    """The ceilings that the first benchmark measured: the better of its rounds. What it could not measure is taken from
    `H200_NOTED`, and their source says so."""
    best = {"read": 0.0, "copy": 0.0, "product": 0.0}
    for row in found:
        us = float(row.get("us") or 0.0)
        if us > 0:
            rate = row["flops"] if row["kernel"] == "product" else row["bytes"]
            best[row["kernel"]] = max(best.get(row["kernel"], 0.0), rate / (us / 1e6))
    # A copy that beats the read-only stream says that the stream was badly read, not that memory is slower.
    bandwidth = max(best["read"], best["copy"])
    absent = [name for name, rate in (("bandwidth", bandwidth), ("product", best["product"])) if not rate]
    return Ceilings(
        read_bytes_per_s=bandwidth or H200_NOTED.read_bytes_per_s,
        flops=best["product"] or H200_NOTED.flops,
        source="; ".join(
            [f"measured in this run on {gpu}"] * (len(absent) < 2)
            + [f"{' and '.join(absent)} not measured, but of {H200_NOTED.source}"] * bool(absent)
        ),
    )


def ratios(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """For each `(section, what, shape)` that others ran too: the best other's time over ours; above 1 is faster."""
    ours: dict[tuple[str, str, str], float] = {}
    theirs: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.ms > 0:
            key = (row.section, row.what, row.shape)
            best = ours if row.engine == OURS else theirs
            best[key] = min(row.ms, best.get(key, row.ms))
    return {key: theirs[key] / ours[key] for key in ours if key in theirs}


def table_of(rows: Sequence[Row], title: str) -> str:
    """Plain text, columns aligned, ours and others' beside each other."""
    best = ratios(rows)
    lines = [("section", "what", "shape", "engine", "ms", "10 % to 90 %", "figure", "roofline", "other / ours", "note")]
    for row in rows:
        ratio = best.get((row.section, row.what, row.shape)) if row.engine == OURS and row.ms > 0 else None
        lines.append(
            (
                row.section,
                row.what,
                row.shape,
                row.engine,
                f"{row.ms:.3f}" if row.ms > 0 else "-",
                f"{row.low_ms:.3f} {row.high_ms:.3f}" if row.high_ms > 0 else "",
                row.figure,
                "-" if row.share is None else f"{100 * row.share:.0f} %",
                "" if ratio is None else f"{ratio:.2f}x",
                row.note,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = (4, 5, 7, 8)
    shown = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *shown])
