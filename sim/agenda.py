"""Virtual time: what happens next."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

MAX_EVENTS_AT_ONE_INSTANT = 1_000_000


class TimeStandsStillError(RuntimeError):
    """Events follow one another without time going on: a livelock."""


class Agenda:
    """Events by (time, rank, sequence); an event's body is atomic in virtual time.

    The rank orders what happens at one instant, so that the order never depends on when an event was written down:
    fast-forward writes fewer of them. Equal ranks keep the order in which they were added.
    """

    def __init__(self) -> None:
        self.now_ns = 0
        self._heap: list[tuple[int, int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._num_at_now = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time_ns: int, rank: int, action: Callable[[], None]) -> None:
        """Let `action` run at `time_ns`, never in the past.

        Args:
            rank: smaller first among events of the same instant.
        """
        assert time_ns >= self.now_ns, f"an event at {time_ns} ns was added at {self.now_ns} ns"
        self._sequence += 1
        heappush(self._heap, (time_ns, rank, self._sequence, action))

    def run_next(self) -> bool:
        """Advance to the next event and run it; False if there is none.

        Raises:
            TimeStandsStillError: a million events have run at this instant.
        """
        if not self._heap:
            return False
        time_ns, _, _, action = heappop(self._heap)
        if time_ns != self.now_ns:
            self.now_ns = time_ns
            self._num_at_now = 0
        self._num_at_now += 1
        if self._num_at_now > MAX_EVENTS_AT_ONE_INSTANT:
            raise TimeStandsStillError(f"{self._num_at_now} events at {time_ns} ns: the last is {action!r}")
        action()
        return True
