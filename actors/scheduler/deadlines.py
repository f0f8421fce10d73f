"""When requests have to be finished."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush

from ...messages.ids import RequestId

_MIN_STALE = 1024


class Deadlines:
    """A heap of deadlines; that of a request which has ended is dropped when it surfaces, or when there are many."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, RequestId]] = []
        self.next_ns = 0  # the earliest one, perhaps of a request that has ended; 0: none

    def add(self, deadline_ns: int, request_id: RequestId, live: Collection[RequestId]) -> None:
        """Add the deadline of a request.

        Args:
            live: has the requests that have not ended.
        """
        heap = self._heap
        if len(heap) > 2 * len(live) + _MIN_STALE:
            self._heap = heap = [entry for entry in heap if entry[1] in live]
            heapify(heap)
        heappush(heap, (deadline_ns, request_id))
        self.next_ns = heap[0][0]

    def pop_due(self, now_ns: int) -> list[RequestId]:
        """Remove the deadlines that have passed; return whose they are, the earliest first."""
        heap = self._heap
        due = []
        while heap and heap[0][0] <= now_ns:
            due.append(heappop(heap)[1])
        self.next_ns = heap[0][0] if heap else 0
        return due
