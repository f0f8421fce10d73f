"""One engine under virtual time: the production scheduler and allocator, and a model in the executor's place."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from itertools import accumulate, islice

import msgspec

from ..actors.kv_allocator.core import AllocatorConfig, KVAllocatorCore
from ..actors.scheduler.core import SchedulerConfig, SchedulerCore, SchedulerInbox
from ..messages.ids import Epoch, RequestId, StepId
from ..messages.request import CancelRequest, RequestEnded, SubmitRequest
from ..messages.step import ExecuteStep, PlanDue, PlanStep, StepExecuted
from ..messages.system import ExecutorFailed, ExecutorLost
from .agenda import Agenda
from .batch_meter import BatchMeter
from .event_log import MINUS_ONE, ReplicaLog
from .step_time.interface import StepShape, StepTimeModel
from .token_meter import TokenMeter

_PLAN_DUE = PlanDue()
_NEVER_SAID = (StepExecuted, ExecutorFailed)  # to an allocator, by a scheduler whose executor is a model
_EMPTY = StepShape(0, 0, 0, (), 0)
_MIN_STRETCH = 3  # shorter ones cost more to skip than to step through
_FIRST_STRETCH = 32  # looked ahead at first; doubled while nobody comes in between

DEADLINE_RANK = 1 << 30
"""Ends of steps come first at an instant, by replica, then deadlines, then what comes from outside."""

NEVER = 1 << 62


class StepInFlight(msgspec.Struct, gc=False):
    """A step that the device has or will have.

    Attributes:
        begin_ns, end_ns: when the device computes it.
        num_rows: of the batch.
        sampled: rows that sample, in the order of the step.
        firsts: rows whose prompt is complete with this step.
        shape: the batch.
    """

    step_id: StepId
    begin_ns: int
    end_ns: int
    num_rows: int
    sampled: tuple[RequestId, ...]
    firsts: tuple[RequestId, ...]
    shape: StepShape


class Coasting(msgspec.Struct, gc=False):
    """A stretch of pure decode steps whose times are known and not yet acted on.

    Attributes:
        ends: of the steps in flight, then of those that the laps plan.
        begins: the same for begins.
        num_laps: after lap i the scheduler has heard of the first i steps.
    """

    ends: list[int]
    begins: list[int]
    num_laps: int


class ReplicaTotals(msgspec.Struct, gc=False):
    """Sums over a replica's life.

    Attributes:
        busy_ns: time its device computed.
        row_ns: rows times the time of their step.
        num_steps, num_skipped: steps executed, and those of them that were skipped over.
        num_recomputed: tokens computed again after a preemption or a loss.
        num_extrapolated: steps outside the model's coverage.
        num_requests: submitted to it.
    """

    busy_ns: int = 0
    row_ns: int = 0
    num_steps: int = 0
    num_skipped: int = 0
    num_recomputed: int = 0
    num_extrapolated: int = 0
    num_requests: int = 0


class Replica:
    """Scheduler and allocator cores in a ring with a device that takes a modelled time.

    Args:
        index: its number; orders simultaneous step ends.
        config: the scheduler's; the allocator's follows from it.
        model: how long steps take.
        agenda: virtual time.
        on_first_token: called with the request and the time of its first token.
        on_ended: called with each request's end.
        fast_forward: skip over stretches of pure decode.
    """

    def __init__(
        self,
        index: int,
        config: SchedulerConfig,
        model: StepTimeModel,
        agenda: Agenda,
        *,
        on_first_token: Callable[[RequestId, int], None],
        on_ended: Callable[[RequestEnded], None],
        fast_forward: bool,
    ) -> None:
        self.index = index
        self.log = ReplicaLog()
        self.totals = ReplicaTotals()
        self.scheduler = SchedulerCore(config)
        self.allocator = KVAllocatorCore(
            AllocatorConfig(
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            )
        )
        self._depth = config.pipeline_depth
        self._model = model
        self._agenda = agenda
        self._on_ended = on_ended
        self._fast_forward = fast_forward
        self._epoch = Epoch(0)
        self._steps: deque[StepInFlight] = deque()
        self._device_free_ns = 0
        self._host_ns = 0  # from now until the device hears of a step planned now
        self._timer = 0  # of the step event that counts; older ones are void
        self._deadline_ns = NEVER
        self._coasting: Coasting | None = None
        self._look_ahead = _FIRST_STRETCH  # what is worked out beyond the next interruption is worked out in vain
        self._seen = (0, 0, 0)
        self._seen_at = 0  # value of `_timer`, which counts what happens
        self._answer_ids: dict[RequestId, int] = {}  # the token that each open request samples, over and over
        self._batch = BatchMeter()
        self.tokens = TokenMeter(on_first_token)
        self._sampled_before: tuple[tuple[RequestId, ...], tuple[int, ...]] = ((), ())

    # -- what reaches it ----------------------------------------------------------------------------------------------

    def submit(self, submit: SubmitRequest, answer_id: int) -> None:
        """Take a request, which will sample `answer_id` as each of its tokens."""
        self.catch_up()
        self.totals.num_requests += 1
        self._answer_ids[submit.request_id] = answer_id
        self._tell(submit)

    def cancel(self, request_id: RequestId) -> None:
        """The client is gone."""
        self.catch_up()
        self._tell(CancelRequest(request_id))

    def lose_executor(self, back_ns: int) -> None:
        """The device forgets everything now, and computes again from `back_ns` on."""
        self.catch_up()
        now_ns = self._agenda.now_ns
        for step in self._steps:  # what was not computed was not busy time
            num_lost_ns = step.end_ns - max(step.begin_ns, min(now_ns, step.end_ns))
            self.totals.busy_ns -= num_lost_ns
            self.totals.row_ns -= step.num_rows * num_lost_ns
        self._steps.clear()
        self._device_free_ns = max(back_ns, now_ns)
        self._batch.forget_all()
        self.tokens.interrupt()
        self._epoch = Epoch(self._epoch + 1)
        self.log.plans.extend((MINUS_ONE, now_ns, self._epoch))
        self._tell(ExecutorLost(self._epoch, "outage"))

    def catch_up(self) -> None:
        """Act on what has happened up to now; with fast-forward that is done only when someone looks."""
        coasting = self._coasting
        if coasting is not None:
            num_laps = bisect_right(coasting.ends, self._agenda.now_ns, hi=coasting.num_laps)
            self._coasting = None
            self._look_ahead = max(_FIRST_STRETCH, 2 * num_laps)
            if num_laps:
                self._advance(coasting, num_laps)

    @property
    def num_open(self) -> int:
        """Requests submitted and not ended."""
        return len(self._answer_ids)

    def look(self) -> tuple[int, int, int]:
        """Requests waiting, requests running, and blocks held, now."""
        if self._coasting is not None:
            self.catch_up()
            self._schedule()
        elif self._timer == self._seen_at:  # nothing has happened since somebody looked
            return self._seen
        stats = self.scheduler.stats()
        self._seen = stats.num_waiting, stats.num_running, self.allocator.stats().num_held
        self._seen_at = self._timer
        return self._seen

    # -- the ring -----------------------------------------------------------------------------------------------------

    def _tell(self, message: SchedulerInbox) -> None:
        """Let the scheduler hear a message and plan."""
        self._host_ns = self._model.host_ns(_EMPTY)
        self._hear(message)
        self._plan()

    def _hear(self, message: SchedulerInbox) -> bool:
        """Let the scheduler hear a message, and the allocator what it says; whether the allocator answered."""
        now_ns = self._agenda.now_ns
        heard: list[SchedulerInbox] = [message]
        for next_message in heard:
            for said in self.scheduler.handle(next_message, now_ns):
                if said is message:
                    continue  # the results of a step, for the clients: they were metered when the step ended
                if isinstance(said, RequestEnded):
                    self._end(said)
                    continue
                assert not isinstance(said, _NEVER_SAID), said
                for answer in self.allocator.handle(said, now_ns):
                    if isinstance(answer, ExecuteStep):
                        assert isinstance(said, PlanStep)
                        self._dispatch(answer, said)
                    else:
                        heard.append(answer)
        return len(heard) > 1

    def _plan(self) -> None:
        """Let the scheduler plan until it has nothing more to say."""
        while self._hear(_PLAN_DUE):
            pass
        self._schedule()
        deadline_ns = self.scheduler.next_deadline_ns or NEVER
        if deadline_ns < self._deadline_ns:
            self._deadline_ns = deadline_ns
            self._agenda.add(max(deadline_ns, self._agenda.now_ns), DEADLINE_RANK, self._keep_deadline)

    def _keep_deadline(self) -> None:
        self._deadline_ns = NEVER
        self.catch_up()
        self._tell(_PLAN_DUE)

    def _schedule(self) -> None:
        """Write down when the next step, or the next stretch of steps, ends."""
        self._timer = timer = self._timer + 1
        if self._fast_forward:
            self._coast()
        if self._coasting is not None:
            end_ns = self._coasting.ends[self._coasting.num_laps - 1]
            self._agenda.add(end_ns, self.index, lambda: self._finish_stretch(timer))
        elif self._steps:
            self._agenda.add(self._steps[0].end_ns, self.index, lambda: self._finish_step(timer))

    def _end(self, ended: RequestEnded) -> None:
        self._answer_ids.pop(ended.request_id, None)
        self.tokens.forget(ended.request_id)
        self._on_ended(ended)

    # -- the device ---------------------------------------------------------------------------------------------------

    def _dispatch(self, step: ExecuteStep, plan: PlanStep) -> None:
        """Give a step to the device, which computes one after the other."""
        batch = self._batch.take(step, plan, self._answer_ids)
        if batch.is_new:
            self._log_plan(step)
        if step.append_blocks:
            self.log.blocks.extend(
                [
                    number
                    for request_id, block_ids in step.append_blocks
                    for block_id in block_ids
                    for number in (step.step_id, request_id, block_id)
                ]
            )
        self.totals.num_recomputed += batch.num_recomputed
        num_rows = len(step.request_ids)
        duration_ns = self._model.step_ns(batch.shape) if num_rows else 0
        begin_ns = max(self._agenda.now_ns + self._host_ns, self._device_free_ns)
        self._device_free_ns = end_ns = begin_ns + duration_ns
        self.totals.busy_ns += duration_ns
        self.totals.row_ns += num_rows * duration_ns
        self._steps.append(
            StepInFlight(step.step_id, begin_ns, end_ns, num_rows, batch.sampled, batch.firsts, batch.shape)
        )

    def _log_plan(self, step: ExecuteStep) -> None:
        """Write down a plan that is not just the one before again."""
        plans = self.log.plans
        plans.extend((step.step_id, len(step.request_ids), *step.request_ids, *step.num_tokens))
        plans.extend((len(step.drop), *step.drop, len(step.start)))
        for start, blocks in zip(step.start, step.block_tables, strict=True):
            plans.extend((start.request_id, start.num_computed_tokens, *blocks))

    def _finish_step(self, timer: int) -> None:
        """The device is done with its first step."""
        if timer != self._timer:
            return
        step = self._steps.popleft()
        self.log.ends.append(step.end_ns)
        self.totals.num_steps += 1
        self.totals.num_extrapolated += self._model.num_extrapolated(step.shape, 1)
        self.tokens.take(step.sampled, step.firsts, step.end_ns, self._answer_ids)
        sampled, token_ids = self._sampled_before
        if step.sampled is not sampled:
            answer_of = self._answer_ids.get
            token_ids = tuple([answer_of(request_id, 0) for request_id in step.sampled])
            self._sampled_before = (step.sampled, token_ids)
        self._host_ns = self._model.host_ns(step.shape)
        self._hear(StepExecuted(self._epoch, step.step_id, step.sampled, token_ids))
        self._plan()

    # -- fast-forward -------------------------------------------------------------------------------------------------

    def _coast(self) -> None:
        """Find the stretch of pure decode steps that lies ahead, if there is one.

        Steps in flight may have begun something; the scheduler knows whether their ends do more than sample.
        """
        steps = self._steps
        if len(steps) != self._depth or steps[-1].shape.prefills or not steps[-1].shape.num_decodes:
            return
        num_laps = min(self.scheduler.decode_horizon(), self._look_ahead)
        if num_laps < _MIN_STRETCH:
            return
        shape = steps[-1].shape
        durations = self._model.decode_run_ns(shape.after_decodes(1), num_laps)
        hosts_ns = [self._model.host_ns(step.shape) for step in steps]
        ends = [step.end_ns for step in steps]
        begins = [step.begin_ns for step in steps]
        shortest_ns = min([*durations, *(step.end_ns - step.begin_ns for step in islice(steps, 1, None))])
        if self._depth > 1 and max(hosts_ns) <= shortest_ns:
            # The host's time is hidden behind the step before: the device goes on without a pause.
            ends.extend(islice(accumulate(durations, initial=ends[-1]), 1, None))
            begins.extend(ends[self._depth - 1 : -1])
        else:
            for i, duration_ns in enumerate(durations):
                host_ns = hosts_ns[i] if i < self._depth else hosts_ns[-1]
                begins.append(max(ends[-1], ends[i] + host_ns))
                ends.append(begins[-1] + duration_ns)
        self._coasting = Coasting(ends, begins, num_laps)

    def _finish_stretch(self, timer: int) -> None:
        """The last lap of a stretch is done."""
        if timer == self._timer:
            self.catch_up()
            self._schedule()

    def _advance(self, coasting: Coasting, num_laps: int) -> None:
        """Do what `num_laps` laps of `_finish_step` would have done."""
        stretch = self.scheduler.advance_decode(num_laps, self._answer_ids.__getitem__)
        blocks = self.allocator.advance_decode(stretch)
        first_id = stretch.first_step_id
        self.log.blocks.extend([number for offset, *placed in blocks for number in (first_id + offset, *placed)])
        begins, ends = coasting.begins, coasting.ends
        self.log.ends.extend(ends[:num_laps])
        steps, depth = list(self._steps), self._depth
        last = steps[-1]
        totals = self.totals
        for step in steps[:num_laps]:
            self.tokens.take(step.sampled, step.firsts, step.end_ns, self._answer_ids)
            totals.num_extrapolated += self._model.num_extrapolated(step.shape, 1)
        if num_laps > depth:
            self.tokens.take_run(last.sampled, ends[depth:num_laps], self._answer_ids)
            totals.num_extrapolated += self._model.num_extrapolated(last.shape.after_decodes(1), num_laps - depth)
        totals.num_steps += num_laps
        totals.num_skipped += num_laps
        num_ns = sum(ends[depth : depth + num_laps]) - sum(begins[depth : depth + num_laps])
        totals.busy_ns += num_ns
        totals.row_ns += last.num_rows * num_ns
        self._device_free_ns = ends[depth + num_laps - 1]
        self._batch.skip(num_laps)
        self._steps = deque(steps[num_laps:])
        for i in range(max(depth, num_laps), depth + num_laps):
            shape = last.shape.after_decodes(i - depth + 1)
            step_id = StepId(first_id + i - depth)
            self._steps.append(StepInFlight(step_id, begins[i], ends[i], last.num_rows, last.sampled, (), shape))
