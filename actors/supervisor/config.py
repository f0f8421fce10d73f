"""Configuration of the supervisor."""

from __future__ import annotations

from typing import Literal

import msgspec

ChildKind = Literal["nursery", "engine", "executor", "edge"]

START_ORDER: tuple[ChildKind, ...] = ("nursery", "engine", "executor", "edge")
"""Children start in this order and are stopped in the reverse."""

TICK_NS = 100_000_000
"""Between two `Tick`s of the carrier."""


class ChildConfig(msgspec.Struct, frozen=True):
    """A process to keep alive.

    Attributes:
        name: unique, such as `executor 0`; its process title, too.
        kind: all executors are the ranks of one group, which live and die together; there is at most one engine.
    """

    name: str
    kind: ChildKind


class SupervisorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who is kept alive, how many restarts are a repair, and how long a silence is death.

    Attributes:
        max_restarts: of the executor within `period_ns`; one more and the supervisor gives up.
        period_ns: the window in which restarts are counted.
        proven_ns: one that was ready for so long and got somewhere may be restarted however often it happens. One that
            this supervisor itself ended must also have served for as long as it took to start, or a loop of verdicts
            would have no end.
        children: processes to keep alive; none where every actor lives in this process.
        max_restarts_of_others: as `max_restarts`, for each other kind of child.
        backoff_ns: before a restart: the first after a child that had become ready, then after each that had not; the
            last one from then on.
        max_silence_ns: without a beat, of a child that is ready and neither computes nor would if it were let.
        max_computing_silence_ns: the same of one that computes: it may be in a long call that lets no other thread run.
        max_hindered_ns: so much more is given to one that is not let run, be it silent or at a step.
        max_silence_at_start_ns: without a beat, of one that is loading, when long calls may hold up its beats; and from
            `StartExecutor` until a loaded executor is ready for its epoch.
        max_engine_start_silence_ns: the same of an engine, which loads nothing, until its first beat.
        max_halt_ns: for which a child may be stopped by a signal before it counts as hung, starting or not: the system
            knows of that at once, and a busy machine's slow start is not taken for it.
        max_start_ns: from a child's start until it is ready.
        stall_ns: if this process stood still for so long (a paused VM, a terminal's Ctrl-Z), so did everybody's beats:
            all of them have their full time once more. Half as long counts at steps, which may be allowed no more.
        first_step_ns: limit of a step of which nothing is known yet (see `StepTimes`).
        num_before: incarnations and epochs that a supervisor before this one may have used: those here begin behind.
    """

    max_restarts: int = 8
    period_ns: int = 60_000_000_000
    proven_ns: int = 300_000_000
    children: tuple[ChildConfig, ...] = ()
    max_restarts_of_others: int = 8
    backoff_ns: tuple[int, ...] = (0, 100_000_000, 500_000_000, 2_000_000_000)
    max_silence_ns: int = 1_500_000_000
    max_computing_silence_ns: int = 3_000_000_000
    max_hindered_ns: int = 8_500_000_000
    max_silence_at_start_ns: int = 30_000_000_000
    max_engine_start_silence_ns: int = 3_000_000_000
    max_halt_ns: int = 300_000_000
    max_start_ns: int = 600_000_000_000
    stall_ns: int = 1_000_000_000
    first_step_ns: int = 120_000_000_000
    num_before: int = 0

    def __post_init__(self) -> None:
        names = [child.name for child in self.children]
        if len(set(names)) != len(names):
            raise ValueError(f"names of children must be unique, got {names}")
        if sum(child.kind == "engine" for child in self.children) > 1:
            raise ValueError(f"there is one engine at most, got {names}")
        if not self.backoff_ns:
            raise ValueError("backoff_ns must not be empty: (0,) restarts at once, always")
