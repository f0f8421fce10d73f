"""Who is alive: epochs and the restart budget of the executor."""

from __future__ import annotations

from collections import deque

import msgspec

from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.system import ExecutorFailed, ExecutorLost, ExecutorReady, StartExecutor

SupervisorInbox = ExecutorReady | ExecutorFailed


class SupervisorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How many restarts are a repair, and how many are a defect.

    Attributes:
        max_restarts: within `period_ns`; one more and the supervisor gives up.
        period_ns: the window in which restarts are counted.
    """

    max_restarts: int = 8
    period_ns: int = 60_000_000_000


class SupervisorCore:
    """Restarts a failed executor under a new epoch, until its restart budget is spent.

    Source: Erlang/OTP design principles, supervisor behaviour (`one_for_one`, intensity and period).
    """

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._epoch = Epoch(0)
        self._restarts_ns: deque[int] = deque()
        self._is_ready = False
        self._gave_up_because = ""

    @property
    def is_executor_ready(self) -> bool:
        return self._is_ready

    @property
    def gave_up_because(self) -> str:
        """Empty while restarts are within budget."""
        return self._gave_up_because

    @property
    def num_restarts(self) -> int:
        return int(self._epoch)

    def handle(self, message: Message, now_ns: int) -> list[Message]:
        """React to an executor's news; messages of an older epoch change nothing."""
        if isinstance(message, ExecutorReady):
            if message.epoch == self._epoch:
                self._is_ready = True
            return []
        assert isinstance(message, ExecutorFailed), message
        if message.epoch != self._epoch or self._gave_up_because:
            return []
        self._is_ready = False
        while self._restarts_ns and now_ns - self._restarts_ns[0] > self._config.period_ns:
            self._restarts_ns.popleft()
        if len(self._restarts_ns) >= self._config.max_restarts:
            self._gave_up_because = message.why
            return []
        self._restarts_ns.append(now_ns)
        self._epoch = Epoch(self._epoch + 1)
        # The executor hears of its new epoch first: the steps of that epoch come behind.
        return [StartExecutor(self._epoch), ExecutorLost(self._epoch, message.why)]
