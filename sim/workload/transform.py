"""A workload made of another, request by request; what all transforms have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized

import msgspec

from .content_ids import ContentIds, content_ids_of
from .request import TraceRequest, Workload, WorkloadCounts

NS = 1_000_000_000


class Tally(msgspec.Struct):
    """What one pass over a transform left out and changed."""

    num_kept: int = 0
    skipped: dict[str, int] = msgspec.field(default_factory=dict)
    changed: dict[str, int] = msgspec.field(default_factory=dict)

    def skip(self, reason: str, num: int = 1) -> None:
        """Count requests that are left out."""
        if num:
            self.skipped[reason] = self.skipped.get(reason, 0) + num

    def change(self, reason: str) -> None:
        """Count a request that is not as it was."""
        self.changed[reason] = self.changed.get(reason, 0) + 1


def added(*counts: dict[str, int]) -> dict[str, int]:
    """Sums by reason, in order of appearance."""
    total: dict[str, int] = {}
    for each in counts:
        for reason, num in each.items():
            total[reason] = total.get(reason, 0) + num
    return total


class Transform:
    """Passes each request of `base` through `apply`.

    A follower's predecessor is found by its `answer_id`, which `apply` must leave as it is. A conversation (or the user
    of a closed loop) whose request is left out ends there.
    """

    def __init__(self, base: Workload, what: str) -> None:
        self.base = base
        self.name = f"{base.name}, {what}"
        self.has_shared_prefixes = base.has_shared_prefixes
        self._what = what
        self._arrived = Tally()  # of the last pass that ended
        self._followed = Tally()  # since the last pass began

    @property
    def content_ids(self) -> ContentIds:
        """Those of the source."""
        return content_ids_of(self.base)

    @property
    def counts(self) -> WorkloadCounts:
        """What the last pass over the arrivals kept and left out, and the followers since it began."""
        base = self.base.counts
        num_requests = self._arrived.num_kept + self._followed.num_kept
        num_skipped = added(base.num_skipped, self._arrived.skipped, self._followed.skipped)
        return WorkloadCounts(
            num_rows=num_requests + sum(num_skipped.values()),
            num_requests=num_requests,
            num_skipped=num_skipped,
            num_changed=added(base.num_changed, self._arrived.changed, self._followed.changed),
        )

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest | None:
        """The request as it is now; None leaves it out (and says so in `tally`)."""
        raise NotImplementedError

    def is_over(self, request: TraceRequest, tally: Tally) -> bool:
        """Whether this arrival and all after it are left out."""
        return False

    def arrivals(self) -> Iterator[TraceRequest]:
        """Requests by arrival."""
        self._arrived, self._followed = Tally(), Tally()
        return self._pass()

    def _pass(self) -> Iterator[TraceRequest]:
        tally = Tally()  # of its own: copies of a workload may go through it side by side
        source = self.base.arrivals()
        for request in source:
            if self.is_over(request, tally):
                num_before = tally.num_kept + sum(tally.skipped.values())
                num_rest = len(self.base) - num_before if isinstance(self.base, Sized) else 1 + sum(1 for _ in source)
                tally.skip(f"after {self._what}", num_rest)
                break
            applied = self.apply(request, tally)
            if applied is not None:
                tally.num_kept += 1
                yield applied
        self._arrived = tally

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        """Those of the source, passed through the same."""
        kept = self.follow(request, ended_ns)
        self._followed.num_kept += len(kept)
        return kept

    def follow(self, request: TraceRequest, ended_ns: int) -> list[TraceRequest]:
        """The followers as they are now; counted by the caller."""
        applied = [self.apply(follower, self._followed) for follower in self.base.followers(request, ended_ns)]
        return [follower for follower in applied if follower is not None]
