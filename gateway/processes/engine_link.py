"""An edge's line to one engine process, over which no request is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from ...actors.ledger.core import LedgerCore, LedgerOutbox
from ...actors.runtime.addresses import endpoint_of
from ...actors.runtime.clock import Clock, MonotonicClock
from ...actors.runtime.port import UnsendableError
from ...actors.scheduler.quarantine import REFUSAL, Quarantine
from ...messages.base import Message
from ...messages.errors import InvalidRequestError, RequestFailedError, RequestQuarantinedError
from ...messages.ids import Epoch
from ...messages.processes import EngineFailed, EngineReport, RememberQuarantined
from ...messages.request import CancelRequest, FinishReason, RequestEnded, StopMatched, SubmitRequest
from ...messages.step import StepExecuted
from ...messages.system import Drain, EngineLost
from .drop_tally import DropTally
from .moved_requests import MovedRequests

if TYPE_CHECKING:
    from ...actors.runtime.asyncio_port import AsyncioPort

log = structlog.get_logger("octavo.link")

FromEngine = StepExecuted | RequestEnded
"""What an engine says to its edge's streams."""


class EngineLink:
    """Carries messages to the current incarnation of an engine, and gives the next one all that live.

    Args:
        name: of the engine.
        carrier: the edge's port.
        run_dir: of the sockets.
        deliver: where steps and ends go that the edge's streams wait for.
        on_stuck: called when the engine takes no more messages, and only its end can help.
        quarantine: of requests that this edge saw convicted; several links may share one.
        clock: monotonic, the same in every process of this host.

    Attributes:
        ledger: through which every request passes.
        report: the engine's latest account; None before the first.
        num_lost: sequences that engines had when they reported last, before they were lost; others accept them again.
        drops: messages that engines' ports threw away.
        incarnation: of the engine that is talked to; 0 before the first.
        is_up: whether the engine listens; what is posted otherwise waits in the ledger.
        is_stuck: whether this incarnation missed something, so that only its end can help.
        is_gone: whether there will never be an engine again.
        on_convicted: called with what other engines must hear of a request that this one convicted.
    """

    def __init__(
        self,
        name: str,
        carrier: AsyncioPort,
        run_dir: str,
        *,
        deliver: Callable[[FromEngine], None],
        on_stuck: Callable[[], None] = lambda: None,
        quarantine: Quarantine | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.ledger = LedgerCore()
        self.report: EngineReport | None = None
        self.num_lost = 0
        self.drops = DropTally()
        self.incarnation = 0
        self.is_up = False
        self.is_stuck = False
        self.is_gone = False
        self.on_convicted: Callable[[RememberQuarantined], None] = lambda _: None
        self._is_draining = False
        self._moved = MovedRequests()
        self._earlier: dict[str, int] = {}  # totals of engines before this one
        self._earlier_step_sizes: tuple[int, ...] = ()
        self._carrier = carrier
        self._run_dir = run_dir
        self._deliver = deliver
        self._on_stuck = on_stuck
        self._quarantine = Quarantine() if quarantine is None else quarantine
        self._clock = clock or MonotonicClock()

    def connect(self, incarnation: int) -> None:
        """Talk to this incarnation from now on, once it is up."""
        self.is_up = self.is_stuck = False
        self.incarnation = incarnation
        self._moved.clear()
        self._carrier.port.connect(self.name, incarnation, endpoint_of(self._run_dir, self.name, incarnation))

    def post(self, message: Message) -> None:
        """Carry a message of the edge; a request's is remembered, whatever becomes of the engine."""
        if isinstance(message, SubmitRequest | CancelRequest | StopMatched):
            again = self.ledger.handle(message, 0)
            if again and isinstance(message, SubmitRequest) and self._is_convicted(message):
                code = RequestQuarantinedError.code
                self.take(RequestEnded(message.request_id, "refused", error_code=code, error=REFUSAL))
                return
            if message.request_id in self._moved and self.is_up:
                # It is back, as the other engine is gone for good; nobody could tell which of both this one speaks of.
                log.error("engine.has_it_twice", engine=self.name, request_id=message.request_id)
                self._give_up_on_engine()
            for onward in again:
                self.send(onward)
        else:
            self._is_draining |= isinstance(message, Drain)
            self.send(message)

    def send(self, message: Message) -> None:
        """Carry a message past the ledger; dropped while the engine is not up."""
        if not self.is_up:
            return
        try:
            is_sent = self._carrier.send(self.name, message)
        except UnsendableError as error:
            if not isinstance(message, SubmitRequest):
                raise
            reason: FinishReason = "error" if message.output_token_ids else "refused"
            self.take(RequestEnded(message.request_id, reason, error_code=InvalidRequestError.code, error=str(error)))
            return
        if not is_sent:
            log.error("engine.does_not_take", engine=self.name, message=type(message).__name__)
            self._give_up_on_engine()

    def refuse(self, submit: SubmitRequest, error: Exception) -> None:
        """End a request that something here raised at: the others are not to end with it."""
        reason: FinishReason = "error" if submit.output_token_ids else "refused"
        ended = RequestEnded(
            submit.request_id,
            reason,
            len(submit.output_token_ids) // 4,
            error_code=RequestFailedError.code,
            error=f"the request could not be given to the engine: {type(error).__name__}: {error}",
        )
        if self.ledger.submit_of(submit.request_id) is None:
            self._deliver(ended)
        else:
            self.take(ended)
            self.send(CancelRequest(submit.request_id))

    def _give_up_on_engine(self) -> None:
        self.is_up = False  # with one message missing, no other may follow
        self.is_stuck = True
        self._on_stuck()

    def take(self, message: FromEngine | EngineReport | EngineFailed) -> None:
        """Take a message of the engine."""
        if self.is_gone:
            return  # what it had goes on elsewhere
        if isinstance(message, EngineReport):
            if self.report is not None and self.report.incarnation != message.incarnation:
                self._keep_totals()
            self.report = message
            if self._moved:
                self._moved.take_report(message)
            self.drops.note(self.name, message.incarnation, message.messages_dropped)
            return
        if isinstance(message, EngineFailed):
            self._take_failure(message)
            return
        if self._moved:
            if isinstance(message, StepExecuted):
                message = self._moved.without(message)
            elif self._moved.take_end(message):
                return
        if isinstance(message, RequestEnded) and message.error_code == RequestQuarantinedError.code:
            self._remember_quarantined(message)
        for onward in self.ledger.handle(message, 0):
            assert isinstance(onward, StepExecuted | RequestEnded)
            self._deliver(onward)

    def _take_failure(self, failed: EngineFailed) -> None:
        if failed.incarnation != self.incarnation:
            return
        log.error("engine.failed", engine=self.name, request_id=failed.request_id, why=failed.why)
        for ended in self.ledger.handle(failed, 0):
            assert isinstance(ended, RequestEnded)
            self._earlier["num_quarantined"] = self._earlier.get("num_quarantined", 0) + 1  # by no engine
            self.take(ended)

    def resubmit(self, epoch: Epoch, why: str) -> None:
        """Give a new engine, which is up, all that the old one had."""
        self._moved.clear()  # those that moved while there was none it never had
        for entry in self._quarantine.entries():  # before anybody sends one of them again
            self.send(entry)
        again = self.ledger.handle(EngineLost(epoch, why), 0)
        log.error("engine.replaced", engine=self.name, epoch=epoch, why=why, num_resubmitted=len(again))
        for onward in again:
            self.send(onward)
        if self._is_draining:
            self.send(Drain())

    def say_again(self) -> list[LedgerOutbox]:
        """What the same engine must hear, which has dropped all that it had of this edge."""
        self._moved.clear()
        return self.ledger.say_again()

    def relieve(self) -> list[LedgerOutbox]:
        """The engine serves nobody for now: what others must hear to go on with what it has; each request moves once.

        It may be alive, with an executor to come, and not know that anything moved: what it says of it does not count.
        """
        messages = self.ledger.hand_over(once=True)
        moved = [message.request_id for message in messages if isinstance(message, SubmitRequest)]
        self._moved.add(moved)
        for request_id in moved:
            self.send(CancelRequest(request_id))
        return messages

    def give_up(self) -> list[LedgerOutbox]:
        """The engine is gone for good: what other engines must hear to go on with what it had."""
        self._keep_totals()
        self.report = None
        self.is_up = False
        self.is_gone = True
        return self.ledger.hand_over()

    def total(self, name: str) -> int:
        """A total of `EngineReport`, over every engine that was connected."""
        return self._earlier.get(name, 0) + (getattr(self.report, name) if self.report is not None else 0)

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """As in `EngineReport`, over every engine that was connected; empty before the first report."""
        return summed(self._earlier_step_sizes, () if self.report is None else self.report.step_sizes)

    def _keep_totals(self) -> None:
        counts = [name for name in EngineReport.__struct_fields__ if name not in ("step_sizes", "messages_dropped")]
        self._earlier = {name: self.total(name) for name in counts}
        if self.report is not None:
            self.num_lost += self.report.num_running + self.report.num_waiting
        self._earlier_step_sizes = self.step_sizes

    def _is_convicted(self, submit: SubmitRequest) -> bool:
        """Whether no engine should see a request: the scheduler itself may be what it kills."""
        is_new = not submit.output_token_ids
        return is_new and self._quarantine.holds(submit, self._clock.now_ns())

    def _remember_quarantined(self, ended: RequestEnded) -> None:
        """An engine's memory dies with it, and is its own; this edge's is for the next one, and for the others."""
        submit = self.ledger.submit_of(ended.request_id)
        if ended.reason == "error" and submit is not None:
            self.on_convicted(self._quarantine.add(submit, self._clock.now_ns()))


def summed(*counts: tuple[int, ...]) -> tuple[int, ...]:
    """Counts of the same buckets together; whoever has none does not count."""
    return tuple(map(sum, zip(*filter(None, counts), strict=True)))
