"""Requests that hold no blocks, the most urgent first."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from .sequence import Sequence, State

_MIN_STALE = 64


class WaitingQueue:
    """A heap by `Sequence.key`; who ends while waiting is dropped when it surfaces, or when many have."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._num_stale = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_stale

    def push(self, sequence: Sequence) -> None:
        """Add a sequence, whose state becomes `WAITING`."""
        sequence.state = State.WAITING
        heappush(self._heap, (sequence.key, sequence))

    def peek(self) -> Sequence | None:
        """Return the most urgent sequence, or None."""
        heap = self._heap
        while heap and heap[0][1].state is not State.WAITING:
            heappop(heap)
            self._num_stale -= 1
        return heap[0][1] if heap else None

    def pop(self) -> None:
        """Remove the sequence that `peek` returned."""
        heappop(self._heap)

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence that is in the queue, whose state has just become `ENDED`."""
        assert sequence.state is State.ENDED
        self._num_stale += 1
        if self._num_stale > _MIN_STALE and self._num_stale * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].state is State.WAITING]
            heapify(self._heap)
            self._num_stale = 0

    def check(self) -> None:
        """Assert that the queue's length is the number of waiting sequences in it."""
        assert len(self) == sum(sequence.state is State.WAITING for _, sequence in self._heap)
