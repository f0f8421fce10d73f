"""What one server tells of itself, and of the edges beside it: samples that add up, and `/metrics` made of them.

The sum carries the names and labels of one edge alone. What cannot be added up, such as a process's memory, carries the
label `edge`; and so does everything that an edge tells of itself alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from ...messages.processes import AccountTold
from ...messages.samples import Labels, SampleFamily, SampleKey
from ..stats import EngineStats
from .engine_metrics import GAUGES_OF_AN_EDGE

EDGE_LABEL: Final = "edge"
OF_PROCESSES: Final = ("process_", "python_")
"""How the names of those metrics begin that are of a process, and of no service."""

_GROWING: Final = ("counter", "histogram", "summary")


class OwnAccount(Protocol):
    """What the server of a process has to tell."""

    def own_families(self, own_stats: EngineStats) -> tuple[SampleFamily, ...]:
        """What this process counts itself; `own_stats` has nothing that engines told."""

    def render_whole(self) -> bytes:
        """Metrics of all edges, as far as this one knows, as Prometheus' text."""

    def num_live_of_all(self) -> int:
        """Sequences that clients of any edge wait for, as far as this one knows."""


class ServiceAccount(Protocol):
    """What the edges of a service know of each other's counts.

    Attributes:
        edge: number of this one.
        is_whole: this edge is the one that knows all of them; else it can ask.
    """

    @property
    def edge(self) -> str: ...

    @property
    def is_whole(self) -> bool: ...

    @property
    def num_live_of_others(self) -> int: ...

    def attach(self, own: OwnAccount) -> None: ...

    def of_others(self) -> tuple[SampleFamily, ...]: ...

    async def ask(self) -> AccountTold | None:
        """The whole account; None if nobody who knows it answers."""


class Collected(Collector):
    """Metrics that were collected, for whoever wants a collector."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def families_of(metrics: Iterable[Metric]) -> tuple[SampleFamily, ...]:
    """What can be told to another process: counts that are not all 0, and gauges that are an edge's or a process's."""
    families = []
    for metric in metrics:
        is_of_process = metric.name.startswith(OF_PROCESSES)
        if metric.type not in _GROWING and not is_of_process and metric.name not in GAUGES_OF_AN_EDGE:
            continue
        if any(sample.value for sample in metric.samples):
            samples = tuple((sample.name, _labels(sample), float(sample.value)) for sample in metric.samples)
            families.append(SampleFamily(metric.name, samples, metric.type in _GROWING and not is_of_process))
    return tuple(families)


def labelled(metrics: Iterable[Metric], edge: str, only: Sequence[str] = ("",)) -> Iterator[Metric]:
    """Give the label `edge` to all samples of metrics whose names begin in one of these ways."""
    for metric in metrics:
        if metric.name.startswith(tuple(only)):
            metric.samples = [sample._replace(labels={**sample.labels, EDGE_LABEL: edge}) for sample in metric.samples]
        yield metric


def summed(metrics: Iterable[Metric], others: Iterable[SampleFamily]) -> Iterator[Metric]:
    """Add what other edges count to this one's, sample by sample."""
    by_family = {family.name: family for family in others}
    for metric in metrics:
        family = by_family.get(metric.name)
        if family is not None:
            metric.samples = list(_sum(metric.samples, family))
        yield metric


def _sum(samples: Sequence[Sample], others: SampleFamily) -> Iterator[Sample]:
    more: dict[SampleKey, float] = {(name, labels): value for name, labels, value in others.samples}
    for sample in samples:
        yield sample._replace(value=sample.value + more.pop((sample.name, _labels(sample)), 0.0))
    for (name, labels), value in more.items():
        yield Sample(name, dict(labels), value)


def _labels(sample: Sample) -> Labels:
    return tuple(sorted(sample.labels.items()))
