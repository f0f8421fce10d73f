"""The state of a cluster over time, at a few hundred instants however long the run is."""

from __future__ import annotations

from collections.abc import Sequence

from .agenda import Agenda
from .replica import Replica
from .results import TimelinePoint

_MAX_POINTS = 400


class Timeline:
    """Looks at all replicas at equal intervals; doubles the interval when there are too many points.

    Args:
        agenda: virtual time.
        rank: after everything else at an instant.
        replicas: to look at.
        num_blocks: of each.
    """

    def __init__(self, agenda: Agenda, rank: int, replicas: Sequence[Replica], num_blocks: int) -> None:
        self._agenda = agenda
        self._rank = rank
        self._replicas = replicas
        self._num_blocks = num_blocks * len(replicas)
        self._interval_ns = 100_000_000
        self.points: list[TimelinePoint] = []
        self.peak_use = [0] * len(replicas)
        agenda.add(0, rank, self._look)

    def _look(self) -> None:
        num_waiting = num_running = num_held = 0
        for i, replica in enumerate(self._replicas):
            waiting, running, held = replica.look()
            num_waiting += waiting
            num_running += running
            num_held += held
            self.peak_use[i] = max(self.peak_use[i], held)
        self.points.append(
            TimelinePoint(self._agenda.now_ns / 1e9, num_waiting, num_running, num_held / self._num_blocks)
        )
        if len(self.points) >= _MAX_POINTS:
            del self.points[1::2]
            self._interval_ns *= 2
        self._agenda.add(self._agenda.now_ns + self._interval_ns, self._rank, self._look)
