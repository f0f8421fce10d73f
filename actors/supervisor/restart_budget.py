"""How many restarts are a repair."""

from __future__ import annotations

_SLACK = 2
"""Cycles of one loop are not equally long."""


class RestartBudget:
    """Restarts of one kind of child, of which so many within a period are a repair, and one more is a defect.

    Source: Erlang/OTP design principles, supervisor behaviour, maximum restart intensity.
    """

    def __init__(self, max_restarts: int, period_ns: int) -> None:
        self._max_restarts = max_restarts
        self._period_ns = period_ns
        self._counted_until_ns: list[int] = []
        self.num_restarts = 0

    def take(self, now_ns: int, *, is_proven: bool = False, cycle_ns: int = 0) -> bool:
        """Take one restart, if there is one left; what had proved itself may be restarted if anything may.

        Args:
            is_proven: whether it had.
            cycle_ns: from its start to its end, if a loop of such cycles is to come to an end even where fewer of them
                than there are restarts fit in the period; they count for longer then.
        """
        if is_proven and self._max_restarts:
            self.num_restarts += 1
            return True
        self._counted_until_ns = [until_ns for until_ns in self._counted_until_ns if until_ns >= now_ns]
        if len(self._counted_until_ns) >= self._max_restarts:
            return False
        self._counted_until_ns.append(now_ns + max(self._period_ns, _SLACK * self._max_restarts * cycle_ns))
        self.num_restarts += 1
        return True
