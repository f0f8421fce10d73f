"""Finds a step that everybody believes to be somebody else's: planned, not answered, and not being executed."""

from __future__ import annotations

from ...messages.processes import EngineReport
from ...messages.system import Beat

LOST_NS = 5_000_000_000
"""So long nothing happens before a step counts as lost: twenty beats and reports."""

MAX_GAP_NS = 1_000_000_000
"""Between two beats of an executor, four of them: one that is not heard for longer has not said that it is idle. It may
have had no processor to take the step with, as little as for its beats."""


class LostStepWatch:
    """Told of the beats of a replica's executors and of the reports of its engine.

    No such step is known to get lost; but nothing would ever come after it, and the streams would hang for ever.
    """

    def __init__(self) -> None:
        self._progress: dict[str, int] = {}
        self._heard_ns: dict[str, int] = {}
        self._idle_since_ns = 0

    def note_beat(self, beat: Beat, now_ns: int) -> None:
        """An executor is alive, and at something or not."""
        has_been_silent = now_ns - self._heard_ns.get(beat.child, now_ns) > MAX_GAP_NS
        self._heard_ns[beat.child] = now_ns
        if beat.busy_ns or has_been_silent or beat.progress != self._progress.get(beat.child):
            self._progress[beat.child] = beat.progress
            self._idle_since_ns = now_ns

    def is_lost(self, report: EngineReport, *, is_ready: bool, now_ns: int) -> bool:
        """Whether the engine waits for a step that no executor is at, as all of them say themselves."""
        if not is_ready:
            self._idle_since_ns = now_ns
        are_heard = all(now_ns - heard_ns <= MAX_GAP_NS for heard_ns in self._heard_ns.values())
        is_overdue = report.num_steps_in_flight > 0 and report.step_age_ns > LOST_NS
        return is_overdue and are_heard and now_ns - self._idle_since_ns > LOST_NS
