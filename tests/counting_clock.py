"""A clock for runs that last for a time: they end by what was done, though the machine stands still meanwhile."""

from __future__ import annotations


class CountingClock:
    """Stands in for a module's `time`, and goes on by a millisecond whenever somebody looks."""

    def __init__(self) -> None:
        self._num_looks = 0

    def monotonic(self) -> float:
        self._num_looks += 1
        return self._num_looks / 1000
