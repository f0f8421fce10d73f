"""Messages that other processes have thrown away, as they tell it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Drops = Sequence[tuple[str, int]]
"""How many messages were dropped for which reason, since a process began."""


class DropTally:
    """Adds up what processes have told, over every incarnation that was heard of."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[int, Drops]] = {}
        self._earlier: Counter[str] = Counter()

    def note(self, name: str, incarnation: int, drops: Drops) -> None:
        """Take note of the latest account of a process."""
        known, account = self._latest.get(name, (incarnation, ()))
        if incarnation < known:
            return
        if incarnation > known:
            self._earlier.update(dict(account))
        self._latest[name] = (incarnation, drops)

    @property
    def totals(self) -> Counter[str]:
        """By reason."""
        totals = Counter(self._earlier)
        for _, drops in self._latest.values():
            totals.update(dict(drops))
        return totals
