"""Several workloads at once; and a rate scaled by laying copies of one over each other."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import msgspec

from ...messages.errors import InvalidWorkloadError
from .content_ids import FIRST_PRIVATE_ID, MAX_CONTENT_ID, ContentIds, content_ids_of
from .draws import Stream
from .request import TraceRequest, Workload, WorkloadCounts
from .transform import NS, Tally, Transform, added

DEFAULT_MAX_SHIFT_NS = 30 * NS
_MAX_COPIES = 10_000
_MAX_PARTS = _MAX_COPIES + 1  # a fixed stride: a session keeps its number whatever is laid over it


class Superposed:
    """Workloads laid over each other; their contents and sessions are kept apart."""

    def __init__(self, parts: Sequence[Workload], *, name: str, is_content_shared: bool = False) -> None:
        """Lay `parts` over each other.

        Args:
            is_content_shared: the parts' shared ids mean the same content (copies of one trace that hit each other's
                prefixes); what is private to a request stays apart.

        Raises:
            InvalidWorkloadError: no parts, or more content than there are ids.
        """
        if not parts:
            raise InvalidWorkloadError("nothing to superpose: give at least one workload")
        if len(parts) > _MAX_PARTS:
            raise InvalidWorkloadError(f"{len(parts)} workloads at once are more than {_MAX_PARTS}")
        self.name = name
        self._num_offered = 0
        self._parts = list(parts)
        ids = [content_ids_of(part) for part in self._parts]
        self._shared_from = [0, *accumulate(each.num_shared for each in ids)]
        self._private_from = [0, *accumulate(each.num_private for each in ids)]
        num_shared = self._shared_from[-1]
        if is_content_shared:
            num_shared = max(each.num_shared for each in ids)
            self._shared_from = [0] * len(self._parts)
        self.content_ids = ContentIds(num_shared, self._private_from[-1])
        self.has_shared_prefixes = any(part.has_shared_prefixes for part in self._parts) or (
            is_content_shared and num_shared > 0
        )
        if num_shared > FIRST_PRIVATE_ID or FIRST_PRIVATE_ID + self._private_from[-1] > MAX_CONTENT_ID + 1:
            raise InvalidWorkloadError(
                f"{name}: {len(self._parts)} parts hold {num_shared} shared and {self._private_from[-1]} private "
                f"contents, more than the {FIRST_PRIVATE_ID} ids of each kind: superpose less, or cut the trace first"
            )

    @property
    def counts(self) -> WorkloadCounts:
        """Requests offered in the last pass and since, and what the parts left out."""
        each = [part.counts for part in self._parts]
        num_skipped = added(*[counts.num_skipped for counts in each])
        return WorkloadCounts(
            num_rows=self._num_offered + sum(num_skipped.values()),
            num_requests=self._num_offered,
            num_skipped=num_skipped,
            num_changed=added(*[counts.num_changed for counts in each]),
        )

    def arrivals(self) -> Iterator[TraceRequest]:
        """By time, ties in the order of the parts."""
        self._num_offered = 0
        streams = [self._numbered(place) for place in range(len(self._parts))]
        return streams[0] if len(streams) == 1 else heapq.merge(*streams, key=_arrival_ns)

    def _numbered(self, place: int) -> Iterator[TraceRequest]:
        num = 0
        for request in self._parts[place].arrivals():
            num += 1
            yield self._outward(request, place)
        self._num_offered += num

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        """Those of the part that the request came from."""
        offset = request.answer_id - FIRST_PRIVATE_ID
        starts = self._private_from if offset >= 0 else self._shared_from
        place = min(bisect_right(starts, offset if offset >= 0 else request.answer_id), len(self._parts)) - 1
        inward = self._shifted(request, -self._shared_from[place], -self._private_from[place])
        if request.session >= 0:
            inward = msgspec.structs.replace(inward, session=request.session // _MAX_PARTS)
        followers = [self._outward(follower, place) for follower in self._parts[place].followers(inward, ended_ns)]
        self._num_offered += len(followers)
        return followers

    def _outward(self, request: TraceRequest, place: int) -> TraceRequest:
        outward = self._shifted(request, self._shared_from[place], self._private_from[place])
        if request.session >= 0:
            outward = msgspec.structs.replace(outward, session=request.session * _MAX_PARTS + place)
        return outward

    @staticmethod
    def _shifted(request: TraceRequest, shared: int, private: int) -> TraceRequest:
        if not shared and not private:
            return request
        return msgspec.structs.replace(
            request,
            segments=tuple(
                [
                    (content_id + (shared if content_id < FIRST_PRIVATE_ID else private), num_tokens)
                    for content_id, num_tokens in request.segments
                ]
            ),
            answer_id=request.answer_id + (shared if request.answer_id < FIRST_PRIVATE_ID else private),
        )


def _arrival_ns(request: TraceRequest) -> int:
    return request.arrival_ns


class _Rotated(Transform):
    """Arrivals later by `shift_ns`; those that leave the span at its end come in at its begin."""

    def __init__(self, base: Workload, shift_ns: int, span_ns: int) -> None:
        super().__init__(base, f"rotated by {shift_ns / NS:g} s")
        self._shift_ns = shift_ns
        self._span_ns = span_ns

    def _pass(self) -> Iterator[TraceRequest]:  # first those that came round
        tally = Tally()
        wrap_ns = self._span_ns - self._shift_ns
        for request in self.base.arrivals():
            if request.arrival_ns >= wrap_ns:
                tally.num_kept += 1
                yield msgspec.structs.replace(request, arrival_ns=request.arrival_ns - wrap_ns)
        for request in self.base.arrivals():
            if request.arrival_ns >= wrap_ns:
                break
            tally.num_kept += 1
            yield msgspec.structs.replace(request, arrival_ns=request.arrival_ns + self._shift_ns)
        self._arrived = tally

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """A follower comes when it comes."""
        return request


class Thinned(Transform):
    """A seeded share of the requests, whole sessions at a time."""

    def __init__(self, base: Workload, share: float, *, seed: int) -> None:
        if not 0 < share <= 1:
            raise InvalidWorkloadError(f"a share of {share:g} is not above 0 and up to 1")
        super().__init__(base, f"thinned to {share:.4g}")
        self._share = share
        self._requests, self._sessions = Stream(seed, "thin"), Stream(seed, "thin sessions")

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest | None:
        """Kept or not."""
        draw = self._sessions.at(request.session) if request.session >= 0 else self._requests.at(request.answer_id)
        if draw.uniform() < self._share:
            return request
        tally.skip("left out by thinning")
        return None

    def follow(self, request: TraceRequest, ended_ns: int) -> list[TraceRequest]:
        """All of what was kept."""
        return list(self.base.followers(request, ended_ns))


def superpose(parts: Sequence[Workload]) -> Workload:
    """Different workloads at once, each with contents of its own.

    Raises:
        InvalidWorkloadError: no parts, or more content than there are ids.
    """
    return Superposed(parts, name=" + ".join(part.name for part in parts))


def scale_rate(
    base: Workload,
    factor: float,
    *,
    seed: int,
    is_content_shared: bool = False,
    max_shift_ns: int = DEFAULT_MAX_SHIFT_NS,
) -> Workload:
    """`factor` times the requests in the same time, with lengths and the course of the load as they were.

    Copies are laid over each other, each rotated by a seeded shift, so that arrivals do not coincide and the load's
    course over minutes stays; a fraction is a thinned copy. The first copy is not rotated.

    Args:
        is_content_shared: copies hold the same shared blocks (more users of the same documents); otherwise each has its
            own.
        max_shift_ns: longest shift; a span of the trace or more evens its course out.

    Raises:
        InvalidWorkloadError: a factor that is not positive or too large.
    """
    if not 1e-6 <= factor <= _MAX_COPIES:
        raise InvalidWorkloadError(f"rate factor {factor:g} is not between 0.000001 and {_MAX_COPIES}")
    num_whole = int(factor + 1e-9)
    share = factor - num_whole
    shares = [1.0] * num_whole + ([share] if share > 1e-9 else [])
    first_ns, last_ns, num = 0, 0, 0
    if len(shares) > 1:
        for num, request in enumerate(base.arrivals(), 1):
            if num == 1:
                first_ns = request.arrival_ns
            last_ns = request.arrival_ns
    span_ns = last_ns + max(1, (last_ns - first_ns) // max(1, num - 1))
    stream = Stream(seed, "rotation")
    parts: list[Workload] = []
    for copy, part_share in enumerate(shares):
        shift_ns = int(stream.at(copy).uniform() * min(max_shift_ns, span_ns)) if copy else 0
        part: Workload = _Rotated(base, shift_ns, span_ns) if shift_ns else base
        parts.append(part if part_share == 1.0 else Thinned(part, part_share, seed=seed))
    return Superposed(parts, name=f"{base.name}, rate x {factor:g}", is_content_shared=is_content_shared)
