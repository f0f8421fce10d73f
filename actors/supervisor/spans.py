"""Times in which something was so: how much of them lies behind a moment."""

from __future__ import annotations

from collections import deque

_MAX_SPANS = 512
"""Those kept: as many ticks as a step has that is excused for as long as any may be, and many more."""


class Spans:
    """Spans of time, in the order of their ends, in nanoseconds; of very many, the latest.

    None is forgotten because it lies behind a moment that was asked about: who asks next may have been delayed for less
    time than who asked last, and ask about an earlier one.
    """

    def __init__(self) -> None:
        self._spans: deque[tuple[int, int]] = deque(maxlen=_MAX_SPANS)

    def add(self, duration_ns: int, until_ns: int) -> None:
        """It was so for `duration_ns`, until now."""
        if duration_ns > 0:
            self._spans.append((until_ns - duration_ns, until_ns))

    def since(self, from_ns: int) -> int:
        """For how long it was so from then on."""
        return sum(max(0, until_ns - max(start_ns, from_ns)) for start_ns, until_ns in self._spans)

    def clear(self) -> None:
        self._spans.clear()
