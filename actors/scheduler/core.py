"""Decides what runs next: admission, token budget, preemption, ends."""

from __future__ import annotations

from collections.abc import Callable

from ...messages.ids import Epoch, RequestId
from ...messages.kv import BlocksFreed, PrefixMatched
from ...messages.request import CancelRequest, StopMatched, SubmitRequest
from ...messages.step import DecodeStretch, PlanDue, StepExecuted
from ...messages.system import Drain, ExecutorLost
from .admission import submit, take_match
from .config import FIRST_EPOCH, SchedulerConfig
from .decode_stretch import advance, find_horizon
from .ending import end, expire
from .executor_loss import lose_executor
from .quarantine import Quarantine
from .sequence import State
from .state import SchedulerOutbox, SchedulerState
from .stats import SchedulerStats
from .step_planning import plan_steps
from .step_results import take_results

__all__ = ["Quarantine", "SchedulerConfig", "SchedulerCore", "SchedulerInbox", "SchedulerOutbox", "SchedulerStats"]

SchedulerInbox = (
    SubmitRequest
    | CancelRequest
    | StopMatched
    | PrefixMatched
    | BlocksFreed
    | StepExecuted
    | ExecutorLost
    | Drain
    | PlanDue
)


class SchedulerCore:
    """Plans steps under a token budget, spending blocks that it counts and never sees.

    Owns one `SchedulerState`, which nobody else changes. The decisions on it are in modules of their own: `admission`,
    `step_planning`, `preemption`, `step_results`, `ending`, `executor_loss`, and for the simulator `decode_stretch`.

    Order is by `Sequence.key` everywhere.

    Args:
        config: checked by itself.
        epoch: the executor's incarnation to begin with.
        quarantine: what is known of requests that kill the executor; a new one by default.
    """

    def __init__(
        self, config: SchedulerConfig, epoch: Epoch = FIRST_EPOCH, *, quarantine: Quarantine | None = None
    ) -> None:
        self._state = SchedulerState(config, epoch, Quarantine() if quarantine is None else quarantine)
        self._handlers: dict[type, Callable[..., None]] = {
            SubmitRequest: self._on_submit,
            CancelRequest: self._on_cancel,
            StopMatched: self._on_stop_matched,
            PrefixMatched: self._on_prefix_matched,
            BlocksFreed: self._on_blocks_freed,
            StepExecuted: self._on_step_executed,
            ExecutorLost: self._on_executor_lost,
            Drain: self._on_drain,
            PlanDue: self._on_plan_due,
        }

    def handle(self, message: SchedulerInbox, now_ns: int) -> list[SchedulerOutbox]:
        """Take one message; return what to send, in order. Steps are planned on `PlanDue` alone.

        `StepExecuted` that is accepted is the first of its own answers, the very same object.
        """
        state = self._state
        out: list[SchedulerOutbox] = []
        state.out = out
        state.now_ns = now_ns
        state.horizon = 0
        # The results of a step come first, then who is too late.
        if 0 < state.deadlines.next_ns <= now_ns and type(message) is not StepExecuted:
            expire(state)
        self._handlers[type(message)](message)
        return out

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended; a drain is complete at 0."""
        return len(self._state.sequences)

    def live_request_ids(self) -> list[RequestId]:
        """Requests accepted and not ended, in the order in which they were submitted."""
        return list(self._state.sequences)

    def num_new_tokens(self) -> dict[RequestId, int]:
        """How many tokens each of those requests has sampled here, beside those that it was submitted with."""
        return {
            request_id: len(sequence.tokens) - sequence.num_prompt - len(sequence.submit.output_token_ids) // 4
            for request_id, sequence in self._state.sequences.items()
        }

    @property
    def expiring_id(self) -> RequestId:
        """Which request's deadline is being kept, at a message that may be about others; -1: none's."""
        return self._state.expiring_id

    def request_ids_in_hand(self) -> list[RequestId]:
        """Those that a step may be about: they have a seat, or would be the next to get one."""
        head = self._state.waiting.peek()
        return [
            request_id
            for request_id, sequence in self._state.sequences.items()
            if sequence is head or sequence.state not in (State.WAITING, State.PARKED)
        ]

    @property
    def next_deadline_ns(self) -> int:
        """When to send `PlanDue` at the latest, so that a deadline is kept though nothing else happens; 0 if never."""
        return self._state.deadlines.next_ns

    def _on_submit(self, request: SubmitRequest) -> None:
        submit(self._state, request)
        if 0 < request.deadline_ns <= self._state.now_ns:
            expire(self._state)

    def _on_cancel(self, cancel: CancelRequest) -> None:
        sequence = self._state.sequences.get(cancel.request_id)
        if sequence is not None:
            end(self._state, sequence, "abort")

    def _on_stop_matched(self, stop: StopMatched) -> None:
        sequence = self._state.sequences.get(stop.request_id)
        if sequence is not None:
            end(self._state, sequence, "stop")

    def _on_prefix_matched(self, matched: PrefixMatched) -> None:
        take_match(self._state, matched)

    def _on_blocks_freed(self, freed: BlocksFreed) -> None:
        if freed.epoch != self._state.epoch:
            self._state.num_dropped_messages += 1
            return
        self._state.credit += freed.num_blocks
        self._state.num_releases_owed -= freed.num_released

    def _on_step_executed(self, executed: StepExecuted) -> None:
        state = self._state
        take_results(state, executed)
        if 0 < state.deadlines.next_ns <= state.now_ns:
            expire(state)

    def _on_executor_lost(self, lost: ExecutorLost) -> None:
        lose_executor(self._state, lost)

    def _on_drain(self, _: Drain) -> None:
        self._state.is_draining = True

    def _on_plan_due(self, _: PlanDue) -> None:
        plan_steps(self._state)

    # -- many steps at once, under virtual time -----------------------------------------------------------------------

    def decode_horizon(self) -> int:
        """Return how many laps ahead are known: each executes and plans one more token for every row, and no more.

        A lap is `StepExecuted` of the oldest step in flight, without stops or failures, then `PlanDue`. Whoever skips
        laps sees to it that no deadline passes meanwhile. May be less than could be known; 0: step as usual.
        """
        state = self._state
        if not state.horizon:
            state.horizon = find_horizon(state)
        return state.horizon

    def advance_decode(self, num_steps: int, token_of: Callable[[RequestId], int]) -> DecodeStretch:
        """Do what so many laps would have done, had every row sampled the same token each time.

        Beside `handle`, for the simulator alone. The cost is that of the rows, and of the blocks that they grow by.

        Args:
            num_steps: at least 1, and at most what `decode_horizon` returned since the last message.
            token_of: what a request samples.

        Returns:
            What the allocator has to do, in place of the plans.
        """
        assert 1 <= num_steps <= self._state.horizon, "more laps than are known: ask decode_horizon first"
        self._state.horizon -= num_steps
        return advance(self._state, num_steps, token_of)

    # -- for metrics and tests ----------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        """Return counts for metrics; changes nothing."""
        return self._state.stats()

    def check(self) -> None:
        """Assert that every request is in exactly one place and that counts agree with what they count."""
        self._state.check()
