"""The least of many small counters, in constant time for most changes."""

from __future__ import annotations

from heapq import heappop, heappush


class LoadTable:
    """A load per replica; ties go to the lowest number.

    A heap whose stale entries are dropped as they surface, so that a thousand replicas cost no more than ten.
    """

    def __init__(self, num_replicas: int) -> None:
        self._loads = [0] * num_replicas
        self._is_up = [True] * num_replicas
        self._heap = [(0, replica) for replica in range(num_replicas)]

    def __getitem__(self, replica: int) -> int:
        return self._loads[replica]

    def is_up(self, replica: int) -> bool:
        """Whether the replica takes requests."""
        return self._is_up[replica]

    def add(self, replica: int, amount: int) -> None:
        """Change a replica's load."""
        self._loads[replica] += amount
        heappush(self._heap, (self._loads[replica], replica))
        if len(self._heap) > 64 + 8 * len(self._loads):
            self._heap = sorted((load, replica) for replica, load in enumerate(self._loads) if self._is_up[replica])

    def set_up(self, replica: int, *, is_up: bool) -> None:
        """Take a replica out, or let it in again."""
        self._is_up[replica] = is_up
        heappush(self._heap, (self._loads[replica], replica))

    def least(self) -> int:
        """The least loaded replica that is up; -1 if none is."""
        heap = self._heap
        while heap:
            load, replica = heap[0]
            if self._loads[replica] == load and self._is_up[replica]:
                return replica
            heappop(heap)
        return -1
