"""The supervisor under watch: its restart budget, and whether it tells the truth about readiness."""

from __future__ import annotations

from collections.abc import Callable

from ...actors.supervisor.config import ChildConfig
from ...actors.supervisor.core import SupervisorConfig, SupervisorCore
from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.system import ExecutorFailed, ExecutorLost, ExecutorReady, ProcessExited, StartExecutor, StartProcess
from .violation import Violation


class SupervisorWatch:
    """The supervisor's core, and the restarts of the executor that it has ordered.

    Args:
        max_restarts: its budget.
        children: processes that it keeps alive; none if engine and executor live in this one.
        give_up: called once, with the reason, when it gives up.

    Attributes:
        restarts_ns: when it took the executor for lost, each time.
    """

    def __init__(self, max_restarts: int, children: tuple[ChildConfig, ...], give_up: Callable[[str], None]) -> None:
        self._config = SupervisorConfig(
            max_restarts=max_restarts, max_restarts_of_others=max(8, max_restarts), children=children
        )
        self._supervisor = SupervisorCore(self._config)
        self._give_up = give_up
        self._has_given_up = False
        self._epoch = self._lost_epoch = Epoch(0)
        self._incarnations: dict[str, int] = {}
        self._began_ns = -1  # when the executor's present process was ready for the first time
        self.restarts_ns: list[int] = []
        self._short_restarts_ns: list[int] = []  # of those whose executor cannot have proved itself

    @property
    def is_ready(self) -> bool:
        return self._supervisor.is_ready

    @property
    def has_given_up(self) -> bool:
        return self._has_given_up

    @property
    def wake_at_ns(self) -> int:
        return self._supervisor.wake_at_ns

    @property
    def num_late_messages(self) -> int:
        return self._supervisor.num_late_messages

    def is_suspect(self, child: str, now_ns: int) -> bool:
        return self._supervisor.is_suspect(child, now_ns)

    def handle(self, message: Message, now_ns: int) -> list[Message]:
        """Let the supervisor handle a message."""
        supervisor = self._supervisor
        was_ready = supervisor.is_executor_ready
        answers = supervisor.handle(message, now_ns)
        if isinstance(message, ExecutorReady):
            if supervisor.is_executor_ready and not was_ready and message.epoch != self._epoch:
                raise Violation("the executor counts as ready though another epoch's is", f"{message}")
            if supervisor.is_executor_ready and self._began_ns < 0:
                self._began_ns = now_ns
        elif self._is_end_of_service(message) and supervisor.is_ready:
            raise Violation("all counts as ready though something has just failed", f"{message}")
        has_given_up = bool(supervisor.gave_up_because) and not self._has_given_up
        for answer in answers:
            if isinstance(answer, StartExecutor):
                self._epoch = answer.epoch
            elif isinstance(answer, StartProcess):
                self._epoch = answer.epoch
                if answer.incarnation != self._incarnations.get(answer.child, 0) + 1:
                    raise Violation("incarnations do not count up by one", f"{answer}")
                self._incarnations[answer.child] = answer.incarnation
                if answer.child != "engine":
                    self._began_ns = -1
            elif isinstance(answer, ExecutorLost) and answer.epoch > self._lost_epoch:  # else told of again
                self._epoch = self._lost_epoch = answer.epoch
                self._note_restart(now_ns)
        if has_given_up:
            self._has_given_up = True
            self._check_given_up(message, now_ns)
            self._give_up(supervisor.gave_up_because)
        return answers

    def _is_end_of_service(self, message: Message) -> bool:
        """Whether this is news of the end of what was in service."""
        if isinstance(message, ExecutorFailed):
            return message.epoch == self._epoch
        return isinstance(message, ProcessExited) and message.incarnation == self._incarnations.get(message.child)

    def _note_restart(self, now_ns: int) -> None:
        """An executor is started again in the place of one that was lost, if there were fewer of these than may be."""
        self.restarts_ns.append(now_ns)
        config = self._config
        # What is no process is never held to have proved itself.
        if config.children and self._began_ns >= 0 and now_ns - self._began_ns >= config.proven_ns:
            return
        self._short_restarts_ns.append(now_ns)
        num_lately = sum(now_ns - restart_ns <= config.period_ns for restart_ns in self._short_restarts_ns)
        if num_lately > config.max_restarts:
            raise Violation(
                "the supervisor does not keep to its restart budget", f"{num_lately} of {config.max_restarts}"
            )

    def _check_given_up(self, message: Message, now_ns: int) -> None:
        config = self._config
        if "engine" in self._supervisor.gave_up_because:
            return  # of the engine it is enough that requests live on until then
        num_lately = sum(now_ns - restart_ns <= config.period_ns for restart_ns in self.restarts_ns)
        if num_lately < config.max_restarts:
            raise Violation(
                "the supervisor gives up before its restart budget is spent",
                f"{num_lately} of {config.max_restarts} at {message}",
            )
