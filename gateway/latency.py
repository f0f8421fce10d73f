"""Latency figures as the field defines them, and the tables that show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from ..actors.runtime.percentile import percentile


class RequestTiming(msgspec.Struct, frozen=True):
    """When one streamed request got what, in seconds on one clock.

    Attributes:
        sent_s: when it was sent.
        token_times_s: when each piece arrived that carried tokens.
        num_prompt_tokens, num_output_tokens: as the server counted them.
    """

    sent_s: float
    token_times_s: tuple[float, ...]
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """End to end."""
        return self.token_times_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.e2e_s - self.ttft_s) / max(1, self.num_output_tokens - 1)


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles of one figure."""

    mean: float
    p50: float
    p90: float
    p99: float


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a load test found; times in seconds, rates per second."""

    num_requests: int
    num_failed: int
    duration_s: float
    request_rate: float
    prompt_token_rate: float
    output_token_rate: float
    ttft_s: Distribution
    itl_s: Distribution
    tpot_s: Distribution
    e2e_s: Distribution


def distribution(values: Sequence[float]) -> Distribution:
    """Summarise values in any order."""
    ordered = sorted(values)
    mean = math.fsum(ordered) / len(ordered) if ordered else math.nan
    return Distribution(mean, percentile(ordered, 0.5), percentile(ordered, 0.9), percentile(ordered, 0.99))


def summarise(timings: Sequence[RequestTiming], *, num_failed: int, duration_s: float) -> LoadReport:
    """Figures of a whole run."""
    gaps = [
        after - before
        for timing in timings
        for before, after in zip(timing.token_times_s, timing.token_times_s[1:], strict=False)
    ]
    return LoadReport(
        num_requests=len(timings),
        num_failed=num_failed,
        duration_s=duration_s,
        request_rate=len(timings) / duration_s,
        prompt_token_rate=sum(timing.num_prompt_tokens for timing in timings) / duration_s,
        output_token_rate=sum(timing.num_output_tokens for timing in timings) / duration_s,
        ttft_s=distribution([timing.ttft_s for timing in timings]),
        itl_s=distribution(gaps),
        tpot_s=distribution([timing.tpot_s for timing in timings if timing.num_output_tokens > 1]),
        e2e_s=distribution([timing.e2e_s for timing in timings]),
    )


def print_report(report: LoadReport, title: str) -> None:
    """A table for a person."""
    console = Console()
    table = Table("milliseconds", "mean", "p50", "p90", "p99", title=title, title_justify="left")
    for name, figures in (
        ("time to first token", report.ttft_s),
        ("inter-token latency", report.itl_s),
        ("time per output token", report.tpot_s),
        ("end to end", report.e2e_s),
    ):
        table.add_row(name, *(f"{1000 * value:.1f}" for value in msgspec.structs.astuple(figures)))
    console.print(table)
    console.print(
        f"{report.num_requests} requests in {report.duration_s:.2f} s ({report.num_failed} failed): "
        f"{report.request_rate:.2f} requests/s, {report.prompt_token_rate:.1f} prompt and "
        f"{report.output_token_rate:.1f} output tokens/s"
    )


def write_json(report: msgspec.Struct | dict[str, object], target: str | None) -> None:
    """Write figures for a program: to a file, to standard output (`-`), or nowhere."""
    if target is None:
        return
    text = msgspec.json.format(msgspec.json.encode(report)).decode()
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n")
