"""Runs a journal again: are all decisions the same, what was the state at a step, why did a request wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ...actors.journal.core import Executed, Lost, decisions_of
from ...actors.scheduler.explain import is_open, request_states, why_waiting
from ...messages.errors import InvalidJournalError
from ...messages.ids import RequestId
from ...messages.kv import PrefixMatched
from ...messages.request import CancelRequest, RequestEnded, SubmitRequest
from ...messages.step import ExecuteStep, PlanDue, PlanStep
from .describe import describe
from .player import CannotHappenError, CoreName, Played, Player
from .reader import Entry, JournalReader
from .replay_report import Divergence, ReplayReport, StateReport, WaitingSpan

__all__ = ["Divergence", "Replay", "ReplayReport", "StateReport", "WaitingSpan", "replay"]

_PROGRESS_EVERY = 20_000


class _Waiting:
    """Collects why one request waits."""

    def __init__(self, request_id: RequestId) -> None:
        self.request_id = request_id
        self.spans: list[WaitingSpan] = []
        self.was_submitted = False

    def look(self, player: Player, plans: list[PlanStep], time_s: float) -> None:
        """Ask after a `PlanDue`, what it planned at hand."""
        if not is_open(player.scheduler, self.request_id):
            return
        missed = [plan for plan in plans if self.request_id not in plan.request_ids]
        reason = why_waiting(player.scheduler, self.request_id, plans[-1].request_ids if plans else ())
        if reason is not None and (missed or not plans):
            constraint, detail = str(reason.constraint), reason.detail
            if not plans and constraint in {"steps in flight", "prefix match"}:
                return  # no step was planned that it might have been part of
        elif reason is None and not player.has_executed:
            constraint, detail = "executor", "it was lost; no step is done since"
        else:
            return
        span = self.spans[-1] if self.spans else None
        if span is None or span.constraint != constraint:
            span = WaitingSpan(-1, -1, 0, time_s, time_s, constraint, detail, detail)
            self.spans.append(span)
        span.end_s, span.last_detail = time_s, detail
        if missed:
            span.last_step = missed[-1].step_id
            if span.first_step < 0:
                span.first_step = missed[0].step_id
            span.num_steps += len(missed)


class Replay:
    """One replay, step by step. `replay` runs it to its end.

    Args:
        reader: of the journal.
        why: request whose waiting is to be explained.
    """

    def __init__(self, reader: JournalReader, why: int | None = None) -> None:
        self._reader = reader
        self.player = Player(reader.header)
        self._waiting = None if why is None else _Waiting(RequestId(why))
        self._num_messages = 0
        self._num_decisions = 0
        self._counts: Counter[type] = Counter()
        self._ends: Counter[str] = Counter()
        self._num_prefix_hits = 0
        self._num_cancels = 0
        self._num_timeouts = 0
        self._num_output_tokens = 0
        self._deadlines: dict[RequestId, int] = {}
        self._divergence: Divergence | None = None
        self._raised = ""
        self._now_ns = reader.header.start_ns
        self._last_plan: PlanStep | None = None
        self._last_placement: ExecuteStep | None = None

    @property
    def _time_s(self) -> float:
        return (self._now_ns - self._reader.header.start_ns) / 1e9

    def run(self, until: int | None, progress: Callable[[int], None] | None) -> None:
        """Play until step `until` is placed, a decision differs, or the journal ends."""
        entries = self._reader.entries()
        for entry in entries:
            self._now_ns = entry.now_ns
            self._num_messages += 1
            step = self.player.last_step_id
            num_in_flight = len(self.player.steps)
            try:
                played = self.player.play(entry)
            except CannotHappenError as error:
                self._diverge(entry, step, "scheduler", heard="", said=(), recorded=str(error))
                return
            if played.difference or (played.raised and not entry.raised):
                recorded = played.difference
                if played.core == "scheduler":
                    recorded += _look_ahead(entries, num_in_flight, step)
                said = tuple(describe(answer) for answer in decisions_of(played.message, played.answers))
                if played.raised:
                    said = (f"raised {played.raised}",)
                self._diverge(entry, step, played.core, heard=describe(played.message), said=said, recorded=recorded)
                return
            self._count(played)
            if self._waiting is not None and type(played.message) is PlanDue:
                plans = [answer for answer in played.answers if isinstance(answer, PlanStep)]
                self._waiting.look(self.player, plans, self._time_s)
            if played.raised:
                self._raised = f"the {played.core.replace('_', ' ')} raised {played.raised}, as it did live"
            placed = self._last_placement
            if until is not None and placed is not None and placed.step_id >= until:
                return
            if progress is not None and self._num_messages % _PROGRESS_EVERY == 0:
                progress(self._num_messages)

    def _diverge(
        self, entry: Entry, step: int, core: CoreName, *, heard: str, said: tuple[str, ...], recorded: str
    ) -> None:
        self._divergence = Divergence(self._num_messages, entry.frame, step, self._time_s, core, heard, said, recorded)

    def _count(self, played: Played) -> None:
        message = played.message
        if isinstance(message, SubmitRequest):
            self._counts[SubmitRequest] += 1
            if message.deadline_ns:
                self._deadlines[message.request_id] = message.deadline_ns
            if self._waiting is not None and message.request_id == self._waiting.request_id:
                self._waiting.was_submitted = True
        decisions = decisions_of(message, played.answers)
        self._num_decisions += bool(decisions)
        for answer in decisions:
            self._counts[type(answer)] += 1
            if isinstance(answer, RequestEnded):
                self._end(answer, is_cancel=isinstance(message, CancelRequest))
            elif isinstance(answer, PlanStep):
                self._last_plan = answer
            elif isinstance(answer, ExecuteStep):
                self._last_placement = answer
            elif isinstance(answer, PrefixMatched):
                self._num_prefix_hits += answer.num_cached_tokens > 0

    def _end(self, ended: RequestEnded, *, is_cancel: bool) -> None:
        self._ends[ended.reason] += 1
        self._num_output_tokens += ended.num_output_tokens
        deadline_ns = self._deadlines.pop(ended.request_id, 0)
        if ended.reason == "abort":
            is_timeout = 0 < deadline_ns <= self._now_ns  # the scheduler looks at deadlines first
            self._num_timeouts += is_timeout
            self._num_cancels += not is_timeout

    def state(self) -> StateReport:
        """Both cores now."""
        player, plan, placement = self.player, self._last_plan, self._last_placement
        return StateReport(
            step=player.last_step_id,
            time_s=self._time_s,
            epoch=player.epoch,
            steps_in_flight=tuple(player.steps),
            scheduler=player.scheduler.stats(),
            allocator=player.allocator.stats(),
            requests=tuple(request_states(player.scheduler)),
            last_plan="" if plan is None else describe(plan),
            last_placement="" if placement is None else describe(placement),
        )

    def report(self) -> ReplayReport:
        """What was found so far."""
        header, counts = self._reader.header, self._counts
        state = self.state()
        waiting = self._waiting
        if waiting is not None and not waiting.was_submitted:
            raise InvalidJournalError(
                f"journal {self._reader.path}: request {waiting.request_id} was never submitted to the scheduler, of "
                f"{counts[SubmitRequest]} that were"
            )
        return ReplayReport(
            path=self._reader.path,
            model=header.model,
            octavo=header.octavo,
            started_at=header.started_at,
            has_tokens=header.has_tokens,
            is_identical=self._divergence is None,
            divergence=self._divergence,
            num_messages=self._num_messages,
            num_decisions=self._num_decisions,
            num_plans=counts[PlanStep],
            num_placements=counts[ExecuteStep],
            num_ends=counts[RequestEnded],
            num_requests=counts[SubmitRequest],
            ends=dict(sorted(self._ends.items())),
            num_preemptions=state.scheduler.num_preemptions,
            num_prefix_hits=self._num_prefix_hits,
            num_cancels=self._num_cancels,
            num_timeouts=self._num_timeouts,
            num_executor_losses=state.scheduler.num_executor_losses,
            num_output_tokens=self._num_output_tokens,
            duration_s=self._time_s,
            raised=self._raised,
            end=self._reader.end,
            state=state,
            waited=() if waiting is None else tuple(waiting.spans),
        )


def _look_ahead(entries: Iterator[Entry], num_in_flight: int, step: int) -> str:
    """What the journal tells of the step after `step`: the rows that sampled, once it was executed."""
    try:
        for entry in entries:
            if isinstance(entry.record, Lost):
                break
            if isinstance(entry.record, Executed):
                if num_in_flight == 0:
                    rows = entry.record.request_ids
                    known = "the same requests as the step before" if rows is None else f"requests {list(rows)[:16]}"
                    return f"; the next step that was executed, step {step + 1}, sampled {known}"
                num_in_flight -= 1
    except InvalidJournalError:
        pass  # damaged further on, which is another matter
    return ""


def replay(
    path: str | Path,
    *,
    until: int | None = None,
    why: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReplayReport:
    """Run a journal again in fresh cores and compare every decision.

    Args:
        path: of the journal.
        until: stop once this step was planned and its blocks were placed; `state` of the report is that moment's.
        why: request id; `waited` of the report tells why it waited, step by step.
        progress: called now and then with the number of messages so far.

    Raises:
        InvalidJournalError: the file is no journal or was changed (the first damaged frame is named), or the request
            asked about never came.
    """
    with JournalReader(path) as reader:
        run = Replay(reader, why)
        run.run(until, progress)
        return run.report()
