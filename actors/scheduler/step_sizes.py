"""How many tokens steps compute, as a histogram: what tells a batch that is too small from one that is full."""

from __future__ import annotations

from typing import Final

BOUNDS: Final = tuple(2**exponent for exponent in range(15))
"""Steps of up to so many tokens are counted together; larger ones in one bucket more."""


class StepSizes:
    """Counts steps by their tokens, each in a fraction of a microsecond.

    Attributes:
        counts: of steps above the bound before and up to this one, then of those above all.
        num_tokens: of all of them.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.num_tokens = 0

    def count(self, num_tokens: int, num_steps: int = 1) -> None:
        """Count steps of so many tokens each, at least one."""
        self.counts[min((num_tokens - 1).bit_length(), len(BOUNDS))] += num_steps
        self.num_tokens += num_tokens * num_steps
