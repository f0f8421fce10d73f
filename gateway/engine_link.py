"""An edge's line to one engine process, over which no request is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from ..actors.ledger.core import LedgerCore
from ..actors.runtime.addresses import endpoint_of
from ..messages.base import Message
from ..messages.ids import Epoch
from ..messages.processes import EngineReport
from ..messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from ..messages.step import StepExecuted
from ..messages.system import Drain, EngineLost

if TYPE_CHECKING:
    from ..actors.runtime.asyncio_port import AsyncioPort

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

    Attributes:
        ledger: through which every request passes.
        report: the engine's latest account; None before the first.
        is_up: whether the engine listens; what is posted otherwise waits in the ledger.
    """

    def __init__(
        self,
        name: str,
        carrier: AsyncioPort,
        run_dir: str,
        *,
        deliver: Callable[[FromEngine], None],
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.ledger = LedgerCore()
        self.report: EngineReport | None = None
        self.is_up = False
        self._is_draining = False
        self._earlier: dict[str, int] = {}  # totals of engines before this one
        self._carrier = carrier
        self._run_dir = run_dir
        self._deliver = deliver
        self._on_stuck = on_stuck

    def connect(self, incarnation: int) -> None:
        """Talk to this incarnation from now on, once it is up."""
        self.is_up = False
        self._carrier.port.connect(self.name, incarnation, endpoint_of(self._run_dir, self.name, incarnation))

    def post(self, message: Message) -> None:
        """Carry a message of the edge; a request's is remembered, whatever becomes of the engine."""
        if isinstance(message, SubmitRequest | CancelRequest | StopMatched):
            for onward in self.ledger.handle(message, 0):
                self.send(onward)
        else:
            self._is_draining |= isinstance(message, Drain)
            self.send(message)

    def send(self, message: Message) -> None:
        """Carry a message past the ledger; dropped while the engine is not up."""
        if self.is_up and not self._carrier.send(self.name, message):
            log.error("engine.does_not_take", engine=self.name, message=type(message).__name__)
            self._on_stuck()

    def take(self, message: FromEngine | EngineReport) -> None:
        """Take a message of the engine."""
        if isinstance(message, EngineReport):
            if self.report is not None and self.report.incarnation != message.incarnation:
                self._earlier = {name: self.total(name) for name in EngineReport.__struct_fields__}
            self.report = message
            return
        for onward in self.ledger.handle(message, 0):
            assert isinstance(onward, StepExecuted | RequestEnded)
            self._deliver(onward)

    def resubmit(self, epoch: Epoch, why: str) -> None:
        """Give a new engine, which is up, all that the old one had."""
        again = self.ledger.handle(EngineLost(epoch, why), 0)
        log.error("engine.replaced", engine=self.name, epoch=epoch, why=why, num_resubmitted=len(again))
        for onward in again:
            self.send(onward)
        if self._is_draining:
            self.send(Drain())

    def total(self, name: str) -> int:
        """A total of `EngineReport`, over every engine that was connected."""
        return self._earlier.get(name, 0) + (getattr(self.report, name) if self.report is not None else 0)
