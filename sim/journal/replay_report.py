"""What a replay finds, as plain values."""

from __future__ import annotations

import msgspec

from ...actors.kv_allocator.core import AllocatorStats
from ...actors.scheduler.core import SchedulerStats
from ...actors.scheduler.explain import RequestState
from .player import CoreName
from .reader import JournalEnd


class Divergence(msgspec.Struct, frozen=True):
    """The first decision that came out otherwise.

    Attributes:
        message: its number, from 1, among all messages heard.
        frame: where it stands in the journal.
        step: the newest step that was planned before.
        time_s: since the journal's begin.
        core: who decided.
        heard: what it heard.
        replayed: what it said in the replay.
        recorded: what is known of what was said live.
    """

    message: int
    frame: int
    step: int
    time_s: float
    core: CoreName
    heard: str
    replayed: tuple[str, ...]
    recorded: str


class WaitingSpan(msgspec.Struct):
    """Consecutive steps that a request was not part of, for one and the same constraint.

    Attributes:
        first_step, last_step: planned without it; the same or -1 if none was planned at all meanwhile.
        num_steps: planned without it.
        begin_s, end_s: when this constraint was seen first and last, since the journal's begin.
        constraint: what it waited for: a `Constraint` of the scheduler, or `executor`.
        first_detail, last_detail: with numbers, at both ends of the span.
    """

    first_step: int
    last_step: int
    num_steps: int
    begin_s: float
    end_s: float
    constraint: str
    first_detail: str
    last_detail: str


class StateReport(msgspec.Struct, frozen=True):
    """Both cores at one moment.

    Attributes:
        step: planned last.
        steps_in_flight: planned and not executed.
        last_plan, last_placement: of that step, as one line; empty if it was not planned or placed.
    """

    step: int
    time_s: float
    epoch: int
    steps_in_flight: tuple[int, ...]
    scheduler: SchedulerStats
    allocator: AllocatorStats
    requests: tuple[RequestState, ...]
    last_plan: str
    last_placement: str


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found.

    Attributes:
        is_identical: every decision that was replayed is the recorded one.
        num_messages: heard by both cores; `num_decisions` of them were answered, and the answers compared.
        num_plans, num_placements, num_ends: `PlanStep`, `ExecuteStep` and `RequestEnded` among the answers.
        ends: reason -> requests.
        num_preemptions, num_prefix_hits, num_cancels, num_timeouts, num_executor_losses: what the journal covers.
            Hits are requests that found some of their prompt cached; timeouts are ends by deadline.
        raised: the exception that ended the journal, live and in the replay alike; else empty.
        end: of the journal; None if it was not read to its end.
        state: asked for by `until`, or at the end.
        waited: asked for by `why`.
    """

    path: str
    model: str
    octavo: str
    started_at: str
    has_tokens: bool
    is_identical: bool
    divergence: Divergence | None
    num_messages: int
    num_decisions: int
    num_plans: int
    num_placements: int
    num_ends: int
    num_requests: int
    ends: dict[str, int]
    num_preemptions: int
    num_prefix_hits: int
    num_cancels: int
    num_timeouts: int
    num_executor_losses: int
    num_output_tokens: int
    duration_s: float
    raised: str
    end: JournalEnd | None
    state: StateReport
    waited: tuple[WaitingSpan, ...]
