"""Edges that do not take what they are told: what must happen before they hear of steps again."""

from __future__ import annotations

import msgspec


class _Shed(msgspec.Struct):
    number: int
    fence: int = -1  # steps planned when none of its requests was live any more; -1: some may be
    is_told: bool = False


class ShedEdges:
    """Who was shed, and how far each is on its way back.

    What an edge has missed can not be told later, so it asks anew for all that it waits for, from the tokens that
    reached it. Its requests keep their ids, and the tokens of the old ones must not be taken for those of the new: so
    it is told only once its old requests have ended (`note_ended`) and the steps that still had rows of them are done
    (`is_due`), and what it says is heard again only from its answer on (`take_answer`).

    Attributes:
        num_shed: how often it happened.
    """

    def __init__(self) -> None:
        self.num_shed = 0
        self._edges: dict[str, _Shed] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._edges

    def add(self, name: str) -> None:
        """An edge takes no more; if it was shed before, all begins anew."""
        self.num_shed += 1
        self._edges[name] = _Shed(self.num_shed)

    def forget(self, name: str) -> None:
        """Another incarnation of an edge is there, or none."""
        self._edges.pop(name, None)

    @property
    def untold(self) -> list[str]:
        """Those that do not know it yet."""
        return [name for name, shed in self._edges.items() if not shed.is_told]

    def number_of(self, name: str) -> int:
        """What the answer of an edge must name."""
        return self._edges[name].number

    def note_ended(self, name: str, num_planned: int) -> None:
        """None of an edge's requests is live, nor will one be before its answer; so many steps were planned so far."""
        shed = self._edges[name]
        if shed.fence < 0:
            shed.fence = num_planned

    def is_due(self, name: str, num_done: int) -> bool:
        """Whether an edge can be told, now that so many of the planned steps are not under way any more."""
        return 0 <= self._edges[name].fence <= num_done

    def note_told(self, name: str, *, is_told: bool = True) -> None:
        """An edge will hear of it; or not, as it refused the line."""
        if name in self._edges:
            self._edges[name].is_told = is_told

    def take_answer(self, name: str, number: int) -> None:
        """An edge has heard that it was shed; from now on it is like any other."""
        shed = self._edges.get(name)
        if shed is not None and shed.is_told and shed.number == number:
            del self._edges[name]
