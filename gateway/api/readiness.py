"""Whether a request sent now would be answered: decided by steps that run, not by a port that is open."""

from __future__ import annotations

from typing import Final

import msgspec

from ..stats import EngineStats

LOOK_EVERY_S: Final = 0.25
"""How often the engine is looked at while nobody asks."""

LOOK_EVERY_NS: Final = int(LOOK_EVERY_S * 1e9)

SLOW_FACTOR: Final = 3
"""A pause so many times as long as the longest that ended well is a stall, on engines slower than the limit."""

FORGET: Final = 0.98
"""What is left of the longest pause at each look that finds progress."""


class ReadinessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How soon trouble counts.

    Attributes:
        grace_ns: an executor that is being replaced makes the server not ready after so long; requests that come
            meanwhile are answered, a little later.
        stall_ns: work is there, and no step has ended for so long.
        max_gap_ns: between two looks, four of them; in a longer one this process itself stood still, and heard nobody.
    """

    grace_ns: int = 1_000_000_000
    stall_ns: int = 5_000_000_000
    max_gap_ns: int = 4 * LOOK_EVERY_NS


class ReadinessCore:
    """Looks at what the engine counts; says why it is not ready, or nothing.

    Time counts against the engine only while this process listened: after a pause of its own (a paused VM, a terminal's
    Ctrl-Z, SIGSTOP) what the engine did meanwhile has yet to be read.
    """

    def __init__(self, config: ReadinessConfig) -> None:
        self._config = config
        self._progress: tuple[int, int, int] | None = None
        self._since_ns = 0  # when it last went on, or had nothing to do
        self._unready_since_ns: int | None = None
        self._was_ready = False
        self._longest_ns = 0.0
        self._looked_ns: int | None = None

    def observe(self, now_ns: int, stats: EngineStats, engine_says: str) -> str:
        """Look, and return why a request sent now would not be answered; empty if it would.

        Args:
            engine_says: the engine's own reason not to be ready; empty if it has none.
        """
        self._excuse_gap(now_ns)
        stalled = self._look_at_progress(now_ns, stats)
        if not engine_says:
            self._unready_since_ns = None
            self._was_ready = True
            return stalled
        if self._unready_since_ns is None:
            self._unready_since_ns = now_ns
        is_short = now_ns - self._unready_since_ns < self._config.grace_ns
        if is_short and self._was_ready:
            return stalled
        self._was_ready = False
        return engine_says

    def _excuse_gap(self, now_ns: int) -> None:
        """Forget the time in which nobody could look."""
        gap_ns = now_ns - self._looked_ns if self._looked_ns is not None else 0
        self._looked_ns = now_ns
        if gap_ns > self._config.max_gap_ns:
            missed_ns = gap_ns - LOOK_EVERY_NS
            self._since_ns += missed_ns
            if self._unready_since_ns is not None:
                self._unready_since_ns += missed_ns

    def _look_at_progress(self, now_ns: int, stats: EngineStats) -> str:
        # Any change is progress: an engine that was itself replaced counts from nothing.
        progress = (stats.num_steps, stats.generation_tokens, stats.prompt_tokens)
        if progress != self._progress or not stats.num_live:
            if self._progress is not None and stats.num_live:
                self._longest_ns = max(FORGET * self._longest_ns, now_ns - self._since_ns)
            self._progress = progress
            self._since_ns = now_ns
            return ""
        limit_ns = max(self._config.stall_ns, int(SLOW_FACTOR * self._longest_ns))
        pause_ns = now_ns - self._since_ns
        if pause_ns < limit_ns:
            return ""
        return f"{stats.num_live} sequences are there, and no step has ended for {pause_ns / 1e9:.0f} s"
