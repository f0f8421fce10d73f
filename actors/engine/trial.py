"""Requests that engines before this one may have failed at: tried a few at a time, and everybody else waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.request import RequestEnded, SubmitRequest
from ...messages.step import StepExecuted
from ..ledger.core import NUM_FAILURES_ON_TRIAL


class Trial:
    """Stands before the scheduler of an engine.

    An exception of scheduler or KV allocator at a message about many requests tells nothing of which of them is its
    cause. The one that is was among the suspects every time, and never came to a token: so those of whom that is true
    for the most failures are tried apart, half of them at most at a time, and each is cleared by its next token. If the
    engine fails again, it is for these that there is one failure more, and at the next engine half of them are tried.
    The last of them is tried by itself, and is then known. Those of fewer failures come once these are cleared.

    All others are held back as long, which is a few steps: what they would cause must not be held against those on
    trial.
    """

    def __init__(self) -> None:
        self._suspects: dict[RequestId, SubmitRequest] = {}  # that wait
        self._others: dict[RequestId, SubmitRequest] = {}  # that wait
        self._tried: dict[RequestId, int] = {}  # with the scheduler, without a token there: and their `num_failures`

    @property
    def is_on(self) -> bool:
        """Whether there are suspects."""
        return bool(self._suspects or self._tried)

    @property
    def tried(self) -> list[RequestId]:
        """The suspects that the scheduler has."""
        return list(self._tried)

    def submit(self, submit: SubmitRequest) -> list[SubmitRequest]:
        """Take what an edge submits; returns what the scheduler is to hear."""
        if submit.num_failures >= NUM_FAILURES_ON_TRIAL:
            self._suspects[submit.request_id] = submit
            return self._let_through()
        if not self.is_on:
            return [submit]
        self._others[submit.request_id] = submit
        return []

    def release(self, request_id: RequestId) -> list[SubmitRequest]:
        """A request is cancelled, or the like: the scheduler must hear of it first, should it wait here."""
        held = self._suspects.pop(request_id, None) or self._others.pop(request_id, None)
        return [held, *self._let_through()] if held is not None else []

    def drop(self, is_void: Callable[[RequestId], bool]) -> list[SubmitRequest]:
        """Forget those that nobody waits for any more; returns what the scheduler is to hear."""
        for waiting in (self._suspects, self._others):
            for request_id in [request_id for request_id in waiting if is_void(request_id)]:
                del waiting[request_id]
        return self._let_through()

    def note(self, answers: Iterable[Message]) -> list[SubmitRequest]:
        """Learn from what the scheduler says who is cleared; returns what it is to hear."""
        for answer in answers:
            if isinstance(answer, StepExecuted):
                for request_id in answer.request_ids:
                    self._tried.pop(request_id, None)
            elif isinstance(answer, RequestEnded):
                self._tried.pop(answer.request_id, None)
        return self._let_through()

    def _let_through(self) -> list[SubmitRequest]:
        through: list[SubmitRequest] = []
        if self._suspects:
            waiting = self._suspects.values()
            highest = max(*(submit.num_failures for submit in waiting), *self._tried.values(), 0)
            worst = [submit for submit in waiting if submit.num_failures == highest]
            most = max(1, (len(worst) + len(self._tried)) // 2)
            through = worst[: max(0, most - len(self._tried))]
            for submit in through:
                del self._suspects[submit.request_id]
                self._tried[submit.request_id] = submit.num_failures
        if not self.is_on:
            through += self._others.values()
            self._others.clear()
        return through
