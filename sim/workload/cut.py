"""Parts of a workload, and the same in less time."""

from __future__ import annotations

import msgspec

from ...messages.errors import InvalidWorkloadError
from .request import TraceRequest, Workload
from .transform import NS, Tally, Transform


class FirstRequests(Transform):
    """The first so many requests, and what follows upon them."""

    def __init__(self, base: Workload, num_requests: int) -> None:
        if num_requests < 1:
            raise InvalidWorkloadError(f"the first {num_requests} requests are none: give 1 or more")
        super().__init__(base, f"the first {num_requests}")
        self._num_requests = num_requests

    def is_over(self, request: TraceRequest, tally: Tally) -> bool:
        """Once there are enough."""
        return tally.num_kept >= self._num_requests

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """As it is."""
        return request


class TimeWindow(Transform):
    """Arrivals in `[begin_ns, end_ns)`, counted from the window's begin."""

    def __init__(self, base: Workload, begin_ns: int, end_ns: int) -> None:
        if not 0 <= begin_ns < end_ns:
            raise InvalidWorkloadError(
                f"the window from {begin_ns / NS:g} s to {end_ns / NS:g} s is empty: "
                "begin at 0 or later, end after that"
            )
        super().__init__(base, f"{begin_ns / NS:g} s to {end_ns / NS:g} s")
        self._begin_ns = begin_ns
        self._end_ns = end_ns

    def is_over(self, request: TraceRequest, tally: Tally) -> bool:
        """Past the window's end."""
        return request.arrival_ns >= self._end_ns

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest | None:
        """Nothing before the window."""
        if request.arrival_ns < self._begin_ns:
            tally.skip("before the window")
            return None
        return msgspec.structs.replace(request, arrival_ns=request.arrival_ns - self._begin_ns)

    def follow(self, request: TraceRequest, ended_ns: int) -> list[TraceRequest]:
        """Nothing after the window."""
        kept = []
        for follower in super().follow(request, ended_ns + self._begin_ns):
            if follower.arrival_ns < self._end_ns - self._begin_ns:
                kept.append(follower)
            else:
                self._followed.skip(f"after {self._what}")
        return kept


class Faster(Transform):
    """All times between arrivals divided by a factor; bursts are squeezed too (see `superpose` for what keeps them)."""

    def __init__(self, base: Workload, factor: float) -> None:
        if not 1e-6 <= factor <= 1e6:
            raise InvalidWorkloadError(f"speed {factor:g} is not between 0.000001 and 1000000")
        super().__init__(base, f"{factor:g} times as fast")
        self._factor = factor

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """Earlier."""
        return msgspec.structs.replace(request, arrival_ns=round(request.arrival_ns / self._factor))

    def follow(self, request: TraceRequest, ended_ns: int) -> list[TraceRequest]:
        """After a think time as much shorter."""
        base_ended_ns = round(ended_ns * self._factor)
        return [
            msgspec.structs.replace(
                follower, arrival_ns=ended_ns + round((follower.arrival_ns - base_ended_ns) / self._factor)
            )
            for follower in self.base.followers(request, base_ended_ns)
        ]
