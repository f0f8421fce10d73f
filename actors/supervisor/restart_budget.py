"""How many restarts are a repair."""

from __future__ import annotations

from collections import deque


class RestartBudget:
    """Restarts of one kind of child, of which so many within a period are a repair, and one more is a defect.

    Source: Erlang/OTP design principles, supervisor behaviour, maximum restart intensity.
    """

    def __init__(self, max_restarts: int, period_ns: int) -> None:
        self._max_restarts = max_restarts
        self._period_ns = period_ns
        self._restarts_ns: deque[int] = deque()
        self.num_restarts = 0

    def take(self, now_ns: int, *, is_proven: bool = False) -> bool:
        """Take one restart, if there is one left; what had proved itself may be restarted if anything may."""
        if is_proven and self._max_restarts:
            self.num_restarts += 1
            return True
        while self._restarts_ns and now_ns - self._restarts_ns[0] > self._period_ns:
            self._restarts_ns.popleft()
        if len(self._restarts_ns) >= self._max_restarts:
            return False
        self._restarts_ns.append(now_ns)
        self.num_restarts += 1
        return True
