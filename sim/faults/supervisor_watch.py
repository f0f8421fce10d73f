"""The supervisor under watch: its restart budget, and whether it tells the truth about readiness."""

from __future__ import annotations

from collections.abc import Callable

from ...actors.supervisor.core import SupervisorConfig, SupervisorCore
from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.system import ExecutorFailed, ExecutorReady, StartExecutor
from .violation import Violation


class SupervisorWatch:
    """The supervisor's core, and the restarts that it has ordered.

    Args:
        max_restarts: its budget.
        give_up: called once, with the reason, when it gives up.
    """

    def __init__(self, max_restarts: int, give_up: Callable[[str], None]) -> None:
        self._config = SupervisorConfig(max_restarts=max_restarts)
        self._supervisor = SupervisorCore(self._config)
        self._give_up = give_up
        self._has_given_up = False
        self._epoch = Epoch(0)
        self._restarts_ns: list[int] = []

    @property
    def epoch(self) -> Epoch:
        """Of the executor that it started last."""
        return self._epoch

    def handle(self, message: Message, now_ns: int) -> list[Message]:
        """Let the supervisor handle a message."""
        supervisor = self._supervisor
        was_ready = supervisor.is_executor_ready
        answers = supervisor.handle(message, now_ns)
        if isinstance(message, ExecutorReady):
            if supervisor.is_executor_ready and not was_ready and message.epoch != self._epoch:
                raise Violation("the executor counts as ready though another epoch's is", f"{message}")
        elif isinstance(message, ExecutorFailed) and message.epoch == self._epoch and not self._has_given_up:
            if supervisor.is_executor_ready:
                raise Violation("the executor counts as ready though it failed", f"{message}")
            self._check_budget(now_ns, any(isinstance(answer, StartExecutor) for answer in answers))
        for answer in answers:
            if isinstance(answer, StartExecutor):
                self._epoch = answer.epoch
        if supervisor.gave_up_because and not self._has_given_up:
            self._has_given_up = True
            self._give_up(supervisor.gave_up_because)
        return answers

    def _check_budget(self, now_ns: int, is_restarted: bool) -> None:
        """A failed executor is started again if there were fewer restarts lately than the budget."""
        num_lately = sum(now_ns - restart_ns <= self._config.period_ns for restart_ns in self._restarts_ns)
        if is_restarted != (num_lately < self._config.max_restarts):
            raise Violation(
                "the supervisor does not keep to its restart budget",
                f"{num_lately} restarts lately of {self._config.max_restarts}, {is_restarted=}",
            )
        if is_restarted:
            self._restarts_ns.append(now_ns)
