"""Finds a step that everybody believes to be somebody else's: planned, not answered, and not being executed."""

from __future__ import annotations

from ..messages.processes import EngineReport
from ..messages.system import Beat

LOST_NS = 5_000_000_000
"""So long nothing happens before a step counts as lost: twenty beats and reports."""


class LostStepWatch:
    """Told of the beats of a replica's executors and of the reports of its engine.

    No such step is known to get lost; but nothing would ever come after it, and the streams would hang for ever.
    """

    def __init__(self) -> None:
        self._progress: dict[str, int] = {}
        self._idle_since_ns = 0

    def note_beat(self, beat: Beat, now_ns: int) -> None:
        """An executor is alive, and at something or not."""
        if beat.busy_ns or beat.progress != self._progress.get(beat.child):
            self._progress[beat.child] = beat.progress
            self._idle_since_ns = now_ns

    def is_lost(self, report: EngineReport, *, is_ready: bool, now_ns: int) -> bool:
        """Whether the engine waits for a step that no executor is at."""
        if not is_ready:
            self._idle_since_ns = now_ns
        return (
            report.num_steps_in_flight > 0 and report.step_age_ns > LOST_NS and now_ns - self._idle_since_ns > LOST_NS
        )
