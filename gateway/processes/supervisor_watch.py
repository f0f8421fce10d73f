"""When a supervisor that is stopped has to make room for the next one."""

from __future__ import annotations

from collections.abc import Callable

MAX_STOPPED_NS = 3_000_000_000
"""How long it may be stopped (SIGSTOP, a terminal's Ctrl-Z) while it is needed."""

MAX_STANDSTILL_NS = 5_000_000_000
"""How long an engine may do nothing for those that wait for it before the supervisor is needed."""

MAX_GAP_NS = 1_500_000_000
"""Between two looks; after a longer one this process itself stood still, and knows nothing."""


class SupervisorWatch:
    """Tells a supervisor that stands still from one that is missed.

    A stopped edge 0 is no loss by itself: engines and executors serve the other edges without it, and its own streams
    go on when it does. Its death would cut those. So it is left alone until something happens that only a supervisor
    can mend: requests wait, and no engine has taken a step for them, or for anybody, for a while. Then its streams wait
    in vain as well, and everybody else's are worth more.
    """

    def __init__(self) -> None:
        self._progress = -1
        self._progressed_ns = 0
        self._stopped_ns = -1
        self._looked_ns = -MAX_GAP_NS

    def look(self, now_ns: int, *, num_waiting: int, progress: int, is_stopped: Callable[[], bool]) -> bool:
        """Look, a few times a second; returns whether the supervisor has to end.

        Args:
            num_waiting: requests of this edge that engines have.
            progress: of engines; it changes with each step.
            is_stopped: whether the supervisor is; asked only if it matters.
        """
        stood_still = now_ns - self._looked_ns > MAX_GAP_NS
        self._looked_ns = now_ns
        if stood_still or not num_waiting or progress != self._progress:
            self._progress = progress
            self._progressed_ns = now_ns
            self._stopped_ns = -1
            return False
        standstill_ns = now_ns - self._progressed_ns
        if standstill_ns < MAX_STANDSTILL_NS - MAX_STOPPED_NS or not is_stopped():
            self._stopped_ns = -1
            return False
        if self._stopped_ns < 0:
            self._stopped_ns = now_ns
        return standstill_ns >= MAX_STANDSTILL_NS and now_ns - self._stopped_ns >= MAX_STOPPED_NS
