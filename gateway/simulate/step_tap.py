"""Watches an engine's steps as they happen: their shapes, how long they took, and what lies around them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.request import RequestEnded, SubmitRequest
from ...messages.step import ExecuteStep, PlanStep, StepExecuted
from ...sim.batch_meter import BatchMeter
from ...sim.step_time.fit_profile import StepSample
from ...sim.step_time.interface import StepShape

Handle = Callable[[Message, int], Sequence[Message]]


class StepTap:
    """Wraps the `handle` of a scheduler and of its allocator; changes nothing of what they hear and say.

    Attributes:
        samples: finished steps, in order, as long as the executor says. (When the scheduler heard of them would tell
            of the event loop: it often hears of two at once.)
        ingress_ns: for each request, from its arrival to the scheduler.
    """

    def __init__(self) -> None:
        self.samples: list[StepSample] = []
        self.ingress_ns: list[int] = []
        self._meter = BatchMeter()
        self._open: dict[RequestId, None] = {}
        self._planned: deque[StepShape] = deque()  # in flight

    def wrap_scheduler(self, handle: Handle) -> Handle:
        """A `handle` that also tells this tap."""

        def watched(message: Message, now_ns: int) -> Sequence[Message]:
            if isinstance(message, SubmitRequest):
                self._open[message.request_id] = None
                self.ingress_ns.append(now_ns - message.arrival_ns)
            elif isinstance(message, StepExecuted):
                self._finish(message)
            answers = handle(message, now_ns)
            for answer in answers:
                if isinstance(answer, RequestEnded):
                    self._open.pop(answer.request_id, None)
            return answers

        return watched

    def wrap_allocator(self, handle: Handle) -> Handle:
        """A `handle` that also tells this tap."""

        def watched(message: Message, now_ns: int) -> Sequence[Message]:
            answers = handle(message, now_ns)
            if isinstance(message, PlanStep):
                for answer in answers:
                    if isinstance(answer, ExecuteStep):
                        self._planned.append(self._meter.take(answer, message, self._open).shape)
            return answers

        return watched

    def _finish(self, executed: StepExecuted) -> None:
        if not self._planned:
            return
        shape = self._planned.popleft()
        if shape.num_tokens and executed.execute_ns > 0:
            self.samples.append(StepSample(shape, executed.execute_ns))
