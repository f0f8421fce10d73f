"""Undo a coarse clock: requests that a trace puts at one tick are spread over the time up to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median_low

import msgspec

from ...messages.errors import InvalidWorkloadError
from .content_ids import ContentIds, content_ids_of
from .draws import Stream
from .request import TraceRequest, Workload, WorkloadCounts


class SpreadTicks:
    """Each request at its recorded time plus a seeded uniform part of the tick."""

    def __init__(self, base: Workload, *, seed: int, tick_ns: int) -> None:
        self.name = f"{base.name}, spread"
        self._base = base
        self._stream = Stream(seed, "spread_ticks")
        self._tick_ns = tick_ns
        self.has_shared_prefixes = base.has_shared_prefixes
        self.content_ids: ContentIds = content_ids_of(base)

    @property
    def counts(self) -> WorkloadCounts:
        """Those of the source."""
        return self._base.counts

    def arrivals(self) -> Iterator[TraceRequest]:
        """By new time; within one tick only is the order changed."""
        together: list[TraceRequest] = []
        for request in self._base.arrivals():
            if together and request.arrival_ns != together[0].arrival_ns:
                gap_ns = request.arrival_ns - together[0].arrival_ns
                yield from self._spread(together, min(gap_ns, self._tick_ns))
                together = []
            together.append(request)
        yield from self._spread(together, self._tick_ns)

    def _spread(self, together: list[TraceRequest], tick_ns: int) -> list[TraceRequest]:
        spread = [
            msgspec.structs.replace(
                request, arrival_ns=request.arrival_ns + int(self._stream.at(request.answer_id).uniform() * tick_ns)
            )
            for request in together
        ]
        return sorted(spread, key=_arrival_ns)

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        """As the source's."""
        return self._base.followers(request, ended_ns)


def _arrival_ns(request: TraceRequest) -> int:
    return request.arrival_ns


def spread_ticks(workload: Workload, *, seed: int, tick_ns: int | None = None) -> SpreadTicks:
    """Spread the requests of each recorded instant uniformly over the tick that begins there.

    Args:
        tick_ns: the clock's tick; None takes the median gap between two recorded instants. No request moves past the
            next instant.

    Raises:
        InvalidWorkloadError: the tick is not positive.
    """
    if tick_ns is None:
        times = list(dict.fromkeys(request.arrival_ns for request in workload.arrivals()))
        gaps = [later - earlier for earlier, later in pairwise(times)]
        tick_ns = median_low(gaps) if gaps else 1
    if tick_ns <= 0:
        raise InvalidWorkloadError(f"a tick of {tick_ns} ns is not positive: give the clock's step")
    return SpreadTicks(workload, seed=seed, tick_ns=tick_ns)
