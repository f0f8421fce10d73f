"""Every decision and every time of a run, as one hash."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable

_FLUSH_AT = 1 << 15


MINUS_ONE = (1 << 64) - 1
"""How -1 is written."""


class NumberStream:
    """A running SHA-256 over 64-bit integers, little endian, not negative: -1 is written as `MINUS_ONE`."""

    def __init__(self) -> None:
        self._numbers = array("Q")  # unsigned: an array of them takes in numbers in a third of the time of signed ones
        self._sha = hashlib.sha256()
        self.append = self._numbers.append
        self._num_flushed = 0

    def __len__(self) -> int:
        return self._num_flushed + len(self._numbers)

    def extend(self, numbers: Iterable[int]) -> None:
        """Add integers."""
        self._numbers.extend(numbers)
        if len(self._numbers) >= _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Hash what has gathered."""
        if sys.byteorder == "big":
            self._numbers.byteswap()
        self._sha.update(self._numbers)
        self._num_flushed += len(self._numbers)
        del self._numbers[:]

    def digest(self) -> bytes:
        """SHA-256 of everything added so far."""
        self.flush()
        return self._sha.digest()


class ReplicaLog:
    """What one replica did, in three streams, so that the same run has the same hash however it was advanced.

    Attributes:
        ends: the end of each executed step.
        plans: each plan whose rows are not just those of the plan before, computing one token each: its step, its rows,
            their tokens, its starts and releases.
        blocks: `(step, request, block)` for each block put into a block table, in order.
    """

    def __init__(self) -> None:
        self.ends = NumberStream()
        self.plans = NumberStream()
        self.blocks = NumberStream()

    def digest(self) -> bytes:
        """SHA-256 over the three streams."""
        return hashlib.sha256(self.ends.digest() + self.plans.digest() + self.blocks.digest()).digest()
