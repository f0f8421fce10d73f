"""Service levels: what a run has to keep."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from ..messages.errors import InvalidConfigError

Metric = Literal["ttft", "tpot", "itl", "e2e", "queue"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2e", "queue")
STATISTICS: dict[str, float] = {"mean": -1.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_TERM = re.compile(r"([a-z0-9]+)[_.]([a-z0-9]+)\s*(<=|<)\s*([0-9.eE+-]+)\s*(ms|us|s)")


class SloTerm(msgspec.Struct, frozen=True):
    """One limit: a statistic of a metric, in seconds.

    Attributes:
        percentile: -1 for the mean.
    """

    metric: Metric
    statistic: str
    percentile: float
    limit_s: float

    @property
    def name(self) -> str:
        """As it is written: `ttft_p99`."""
        return f"{self.metric}_{self.statistic}"


class Slo(msgspec.Struct, frozen=True):
    """All limits; a run meets them if each holds.

    A request meets them if each of its own figures is within the tightest limit of that metric.
    """

    terms: tuple[SloTerm, ...] = ()

    def limits(self) -> dict[str, float]:
        """Name -> limit in seconds, for reports."""
        return {term.name: term.limit_s for term in self.terms}

    def request_limits(self) -> dict[str, float]:
        """Metric -> tightest limit in seconds, for goodput."""
        limits: dict[str, float] = {}
        for term in self.terms:
            limits[term.metric] = min(term.limit_s, limits.get(term.metric, term.limit_s))
        return limits


def parse_slo(text: str) -> Slo:
    """Read `ttft_p99<1s,tpot_p99<50ms`.

    Args:
        text: terms `METRIC_STATISTIC<NUMBER UNIT`; metrics ttft, tpot, itl, e2e, queue; statistics mean, p50, p90, p95,
            p99, max; units s, ms, us.

    Raises:
        InvalidConfigError: what cannot be read, and what could.
    """
    terms = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _TERM.fullmatch(part)
        if match is None:
            raise InvalidConfigError(
                f"the service level {part!r} cannot be read: write it as ttft_p99<1s or tpot_p50<50ms"
            )
        metric, statistic, _, number, unit = match.groups()
        if metric not in METRICS:
            raise InvalidConfigError(f"the service level {part!r} is about {metric!r}: use one of {', '.join(METRICS)}")
        if statistic not in STATISTICS:
            raise InvalidConfigError(
                f"the service level {part!r} asks for {statistic!r}: use one of {', '.join(STATISTICS)}"
            )
        try:
            limit_s = float(number) * _UNITS[unit]
        except ValueError:
            limit_s = 0.0
        if not 0 < limit_s < float("inf"):
            raise InvalidConfigError(f"the service level {part!r} needs a limit above 0")
        terms.append(SloTerm(metric, statistic, STATISTICS[statistic], limit_s))
    if not terms:
        raise InvalidConfigError("the service level is empty: write it as ttft_p99<1s,tpot_p99<50ms")
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise InvalidConfigError(f"the service level names {name} twice: give one limit")
    return Slo(tuple(terms))
