"""Whether scheduler and KV allocator still keep their own laws, asked now and then between steps."""

from __future__ import annotations

from typing import Protocol

from ..runtime.clock import Clock

IDLE_NS = 1_000_000_000
"""Between two audits of an engine that has nothing to do."""

BUSY_NS = 30_000_000_000
"""Between two of one that has, and never so little that audits take more than a thousandth of its time."""

_SHARE = 1_000


class Audited(Protocol):
    """A core that can look at itself."""

    def check(self) -> None:
        """Raise `AssertionError` if something is wrong."""
        ...


class Audit:
    """Has cores check themselves: all blocks accounted for, every reference counted, every request in one place.

    A mismatch has no cure from within: whoever would correct it does not know which side is wrong. A new engine, which
    is given every live request again, knows. (Under `python -O` the cores' assertions are gone, and nothing is found.)

    Args:
        cores: to be checked.
        clock: that also tells how long it takes.
    """

    def __init__(self, cores: tuple[Audited, ...], clock: Clock) -> None:
        self._cores = cores
        self._clock = clock
        self._due_ns = clock.now_ns() + IDLE_NS
        self._busy_due_ns = clock.now_ns() + BUSY_NS
        self.num_done = 0

    def find_fault(self, *, is_idle: bool) -> str:
        """Check if it is time; returns what is wrong, or nothing.

        Args:
            is_idle: no step is under way, and nobody waits for one.
        """
        now_ns = self._clock.now_ns()
        if now_ns < (self._due_ns if is_idle else self._busy_due_ns):
            return ""
        try:
            for core in self._cores:
                core.check()
        except AssertionError as error:
            return f"{type(core).__name__} contradicts itself: {error or 'an invariant is broken'}"
        end_ns = self._clock.now_ns()
        took_ns = end_ns - now_ns
        self._due_ns = end_ns + max(IDLE_NS, _SHARE * took_ns)
        self._busy_due_ns = end_ns + max(BUSY_NS, _SHARE * took_ns)
        self.num_done += 1
        return ""
