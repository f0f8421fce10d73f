"""Scheduler and allocator under watch: what they may say, and what they must agree on, after every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...actors.kv_allocator.core import AllocatorConfig, KVAllocatorCore
from ...actors.scheduler.core import SchedulerCore
from ...messages.base import Message
from ...messages.ids import Epoch, RequestId, StepId
from ...messages.kv import BlocksFreed, PrefixMatched, ResetPrefixCache
from ...messages.request import CancelRequest, RequestEnded, SubmitRequest
from ...messages.step import PlanStep, StepExecuted
from ...messages.system import Drain, ExecutorFailed, ExecutorLost
from .scenario import Scenario
from .violation import Violation


class RingWatch:
    """The two cores, and what they have shown so far.

    Args:
        scenario: of the run.
        epoch: the executor's, to begin with.
        before: of the engine that was lost; what has gone wrong so far goes on to count.

    Attributes:
        submitted, ended: requests that the scheduler heard of, and the ends that it told.
        ever_submitted, convicts: requests that this or an earlier one heard of, and those found to kill executors.
        num_to_allocator, num_to_scheduler: messages between the two that are under way.
        num_losses, num_row_failures, is_to_drain: what the scheduler has been told of.
        epoch: the executor's, as the scheduler knows it.
        faulty_epochs: in which an executor said something that cannot be, or something it said was lost.
        garbled: `(epoch, step)` of results that cannot be.
        is_link_lossy: results may get lost in any epoch.
    """

    def __init__(self, scenario: Scenario, epoch: Epoch = Epoch(0), before: RingWatch | None = None) -> None:  # noqa: B008  # a number
        config = scenario.scheduler
        self._config = config
        self._checks_each_message = scenario.checks_each_message
        self.scheduler = SchedulerCore(config, epoch)
        self.allocator = KVAllocatorCore(
            AllocatorConfig(
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            epoch,
        )
        self.submitted: dict[RequestId, SubmitRequest] = {}
        self.ended: dict[RequestId, RequestEnded] = {}
        self.ever_submitted: dict[RequestId, SubmitRequest] = before.ever_submitted if before else {}
        self.convicts: list[SubmitRequest] = before.convicts if before else []
        self._cancelled: dict[RequestId, None] = {}
        self._next_step_id = 0
        self._passed_step_id = -1
        self.num_to_allocator = 0
        self.num_to_scheduler = 0
        self.num_losses: int = before.num_losses if before else 0
        self.num_row_failures: int = before.num_row_failures if before else 0
        self.is_to_drain: bool = before.is_to_drain if before else False
        self._has_drained = False
        self.faulty_epochs: dict[Epoch, None] = {}
        self.is_link_lossy: bool = before.is_link_lossy if before else False
        self.garbled: dict[tuple[Epoch, StepId], None] = {}
        self.epoch = epoch

    def handle_scheduler(self, message: Message, now_ns: int) -> Sequence[Message]:
        """Let the scheduler handle a message."""
        if isinstance(message, SubmitRequest):
            self.submitted[message.request_id] = self.ever_submitted[message.request_id] = message
            if message.request_id in self._cancelled:
                raise Violation("a cancel overtakes the request that it cancels", f"request {message.request_id}")
        elif isinstance(message, ExecutorLost):
            if message.epoch > self.epoch:
                self.num_losses += 1
                self.epoch = message.epoch
        elif isinstance(message, StepExecuted):
            self.num_row_failures += len(message.failed)
        elif isinstance(message, PrefixMatched | BlocksFreed):
            self.num_to_scheduler -= 1
        answers = self.scheduler.handle(message, now_ns)  # type: ignore[arg-type]  # hears what its routes say
        for answer in answers:
            if isinstance(answer, StepExecuted):
                self._note_results(message, answer, is_first=answer is answers[0])
                continue
            if isinstance(answer, RequestEnded):
                self._note_end(answer)
                continue
            if isinstance(answer, ExecutorFailed):
                self._note_fault(answer)
                continue
            self.num_to_allocator += 1
            if isinstance(answer, PlanStep):
                self._check_plan(answer)
        self._check_answer(message)
        return answers

    def handle_allocator(self, message: Message, now_ns: int) -> Iterable[Message]:
        """Let the allocator handle a message."""
        if not isinstance(message, ResetPrefixCache):
            self.num_to_allocator -= 1
        answers = self.allocator.handle(message, now_ns)  # type: ignore[arg-type]  # hears what its routes say
        for answer in answers:
            if isinstance(answer, PrefixMatched | BlocksFreed):
                self.num_to_scheduler += 1
        if isinstance(message, PlanStep):
            self.allocator.check()
        elif self._checks_each_message:
            self.check()
        return answers

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _note_results(self, heard: Message, executed: StepExecuted, *, is_first: bool) -> None:
        """Results go on to the clients' side once, in order, before what follows from them."""
        if executed is not heard or not is_first:
            raise Violation("results are told that nobody said, or behind what follows from them", f"{executed}")
        if executed.epoch != self.epoch or executed.step_id <= self._passed_step_id:
            raise Violation("late or repeated results are passed on", f"{executed}")
        if (executed.epoch, executed.step_id) in self.garbled:
            raise Violation("results that cannot be are passed on", f"{executed}")
        self._passed_step_id = executed.step_id

    def _note_fault(self, failed: ExecutorFailed) -> None:
        if failed.epoch not in self.faulty_epochs and not self.is_link_lossy:
            raise Violation("a sound executor is taken for a faulty one", f"{failed}")

    def _note_end(self, ended: RequestEnded) -> None:
        if ended.request_id in self.ended:
            raise Violation("a request ends twice", f"{ended}")
        if ended.request_id not in self.submitted:
            raise Violation("a request ends that nobody submitted", f"{ended}")
        self.ended[ended.request_id] = ended
        if ended.error_code == "request_quarantined" and ended.reason == "error":
            self.convicts.append(self.submitted[ended.request_id])

    def _check_plan(self, plan: PlanStep) -> None:
        if plan.step_id != self._next_step_id:
            raise Violation("step ids do not count up by one", f"{plan.step_id}, not {self._next_step_id}")
        self._next_step_id += 1
        for request_id in plan.request_ids:
            if request_id in self.ended:
                raise Violation("an ended request is planned", f"request {request_id}, step {plan.step_id}")

    def _check_answer(self, message: Message) -> None:
        """What holds once the scheduler has handled this."""
        if isinstance(message, StepExecuted):
            self.scheduler.check()
            self._check_credit()
        elif isinstance(message, SubmitRequest):
            if self._has_drained and not message.is_taken_up_again and message.request_id not in self.ended:
                raise Violation("a draining engine accepts a request", f"request {message.request_id}")
            self._check_queue()
        elif isinstance(message, CancelRequest):
            self._cancelled[message.request_id] = None
            if message.request_id in self.submitted and message.request_id not in self.ended:
                raise Violation("a cancelled request goes on", f"request {message.request_id}")
        elif isinstance(message, Drain):
            self.is_to_drain = self._has_drained = True
        if self._checks_each_message:
            self.check()
            self._check_accounts()

    def _check_accounts(self) -> None:
        """Who was accepted has come to an end of his own, has failed, has left, or is live (I9); counted here, too."""
        stats = self.scheduler.stats()
        reasons = [ended.reason for ended in self.ended.values()]
        num_refused = reasons.count("refused")
        counted = {
            "accepted": (stats.num_accepted, len(self.submitted) - num_refused),
            "refused": (stats.num_refused, num_refused),
            "finished": (stats.num_completed, reasons.count("stop") + reasons.count("length")),
            "failed": (stats.num_failed, reasons.count("error")),
            "cancelled": (stats.num_cancelled, reasons.count("abort")),
            "live": (self.scheduler.num_requests, len(self.submitted) - len(self.ended)),
        }
        for what, (told, seen) in counted.items():
            if told != seen:
                raise Violation("the scheduler's account of its requests is wrong", f"{what}: {told}, not {seen}")
        if stats.num_accepted != stats.num_completed + stats.num_failed + stats.num_cancelled + counted["live"][0]:
            raise Violation("who was accepted is neither over nor live", f"{stats}")

    def _check_queue(self) -> None:
        """The queue is bounded; who comes back to it (preempted, or after a loss) had a seat, or was live before."""
        num_waiting = self.scheduler.stats().num_waiting
        num_from_before = sum(submit.is_taken_up_again for submit in self.submitted.values())
        if num_waiting > self._config.max_num_queued_requests + self._config.max_num_seqs + num_from_before:
            raise Violation(
                "the queue grows beyond its bound", f"{num_waiting} of {self._config.max_num_queued_requests}"
            )

    def _check_credit(self) -> None:
        if not self.num_to_allocator and not self.num_to_scheduler:
            scheduler, allocator = self.scheduler.stats(), self.allocator.stats()
            can_be_had = allocator.num_free + allocator.num_cached
            if scheduler.credit + scheduler.num_promised_blocks != can_be_had:
                raise Violation(
                    "the scheduler's credit is not what the allocator has",
                    f"{scheduler.credit} + {scheduler.num_promised_blocks} promised, {can_be_had} free or cached",
                )

    def check(self) -> None:
        """Everything that holds at any time."""
        self.scheduler.check()
        self.allocator.check()
        self._check_credit()

    def check_end(self) -> None:
        """Nothing happens any more: everything has ended, and nothing is held."""
        for request_id in self.submitted:
            if request_id not in self.ended:
                raise Violation("an accepted request never ends", f"request {request_id}")
        self.check()
        self._check_accounts()
        scheduler, allocator = self.scheduler.stats(), self.allocator.stats()
        check_nothing_left(
            {
                "requests of the scheduler": self.scheduler.num_requests,
                "running": scheduler.num_running,
                "waiting": scheduler.num_waiting,
                "steps in flight": scheduler.num_steps_in_flight,
                "blocks missing from the credit": scheduler.num_blocks - scheduler.credit,
                "blocks held": allocator.num_held,
                "messages to the allocator": self.num_to_allocator,
                "messages to the scheduler": self.num_to_scheduler,
            }
        )


def check_nothing_left(left: dict[str, int]) -> None:
    """Raise a violation if any of these numbers is not zero."""
    for what, number in left.items():
        if number:
            raise Violation(f"something is left when all is done: {what}", str(number))
