"""Tenants, priorities, deadlines and impatience, given to requests by seeded chance."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Generic, Literal, TypeVar

import msgspec

from ...messages.errors import InvalidWorkloadError
from .draws import Stream
from .request import TraceRequest, Workload
from .transform import NS, Tally, Transform

_Choice = TypeVar("_Choice")


class _Choices(Generic[_Choice]):
    """One of several, by weight."""

    def __init__(self, weights: Mapping[_Choice, float], what: str) -> None:
        if not weights or any(not 0 <= weight < 1e9 for weight in weights.values()) or not sum(weights.values()):
            raise InvalidWorkloadError(f"{what} need weights from 0, one of them above, not {dict(weights)}")
        self._names = list(weights)
        self._bounds = list(accumulate(weights.values()))

    def pick(self, uniform: float) -> _Choice:
        """By a number in [0, 1)."""
        place = bisect_right(self._bounds, uniform * self._bounds[-1])
        return self._names[min(place, len(self._names) - 1)]


class AssignTenants(Transform):
    """A tenant for each request, the same for all of a session."""

    def __init__(self, base: Workload, weights: Mapping[str, float], *, seed: int) -> None:
        super().__init__(base, "tenants " + "+".join(weights))
        self._choices = _Choices(weights, "tenants")
        self._requests, self._sessions = Stream(seed, "tenant"), Stream(seed, "tenant of session")

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """With its tenant."""
        draw = self._sessions.at(request.session) if request.session >= 0 else self._requests.at(request.answer_id)
        return msgspec.structs.replace(request, tenant=self._choices.pick(draw.uniform()))


class AssignPriorities(Transform):
    """A priority for each request."""

    def __init__(self, base: Workload, weights: Mapping[int, float], *, seed: int) -> None:
        super().__init__(base, "priorities " + "+".join(map(str, weights)))
        self._choices = _Choices(weights, "priorities")
        self._stream = Stream(seed, "priority")

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """With its priority."""
        return msgspec.structs.replace(
            request, priority=self._choices.pick(self._stream.at(request.answer_id).uniform())
        )


class SomeLeave(Transform):
    """A share of the requests gets a deadline (`timeout`), or a client that leaves (`cancel`).

    Args:
        chance: the share, 0 to 1.
        low_ns, high_ns: how long after arrival, uniform between.
    """

    def __init__(
        self, base: Workload, kind: Literal["timeout", "cancel"], *, chance: float, low_ns: int, high_ns: int, seed: int
    ) -> None:
        if not 0 <= chance <= 1:
            raise InvalidWorkloadError(f"{kind}: chance {chance:g} is not from 0 to 1")
        if not 0 < low_ns <= high_ns:
            raise InvalidWorkloadError(
                f"{kind}: from {low_ns / NS:g} s to {high_ns / NS:g} s is no time after arrival: give 0 < from <= to"
            )
        super().__init__(base, f"{kind} of {chance:.0%} after {low_ns / NS:g} s to {high_ns / NS:g} s")
        self._kind = kind
        self._chance, self._low_ns, self._high_ns = chance, low_ns, high_ns
        self._stream = Stream(seed, kind)

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """With it, if chance has it so."""
        draw = self._stream.at(request.answer_id)
        if draw.uniform() >= self._chance:
            return request
        tally.change(f"{self._kind} set")
        after_ns = self._low_ns + int(draw.uniform() * (self._high_ns - self._low_ns))
        if self._kind == "timeout":
            return msgspec.structs.replace(request, timeout_ns=after_ns)
        return msgspec.structs.replace(request, cancel_after_ns=after_ns)
