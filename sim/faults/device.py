"""Executors one after another: they crash, hang, come back, and speak when nobody listens any more."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial

from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.step import ExecuteStep
from ...messages.system import ExecutorFailed, ExecutorReady, StartExecutor
from ..agenda import Agenda
from .executor_model import ExecutorModel, PoisonError


class _Incarnation:
    """One life of the executor.

    Attributes:
        is_dead: it executes and says nothing any more.
        is_cut_off: it will not hear that it was given up.
        frozen_until_ns: it hangs until then.
    """

    def __init__(self, model: ExecutorModel) -> None:
        self.model = model
        self.queue: deque[ExecuteStep] = deque()
        self.is_ready = False
        self.is_busy = False
        self.is_dead = False
        self.is_cut_off = False
        self.frozen_until_ns = 0


class Device:
    """The executor's place in the graph.

    Args:
        agenda: virtual time.
        rng: how long steps take.
        make_model: an empty executor of an epoch.
        send: says a message in the executor's name, whichever of them it is: one that was given up may not know it,
            and goes on speaking; its epoch tells.
        lose_sent: called when an executor is killed: what it said last may never arrive.
        step_ns, step_token_ns, load_ns, notice_ns: see `Scenario`.
    """

    def __init__(
        self,
        agenda: Agenda,
        rng: random.Random,
        make_model: Callable[[Epoch], ExecutorModel],
        *,
        send: Callable[[Message], None],
        lose_sent: Callable[[], None],
        step_ns: int,
        step_token_ns: int,
        load_ns: int,
        notice_ns: int,
    ) -> None:
        self._agenda = agenda
        self._random = rng.random
        self._make_model = make_model
        self._send = send
        self._lose_sent = lose_sent
        self._step_ns = step_ns
        self._step_token_ns = step_token_ns
        self._load_ns = load_ns
        self._notice_ns = notice_ns
        self.num_deaths = 0
        self._current = _Incarnation(make_model(Epoch(0)))

    @property
    def model(self) -> ExecutorModel:
        """Of the executor that is in service."""
        return self._current.model

    def describe(self) -> str:
        """For a report of who waits for whom."""
        current = self._current
        words = [f"epoch {current.model.epoch}", f"{len(current.queue)} steps queued"]
        words += [word for word in ("is_ready", "is_busy", "is_dead") if getattr(current, word)]
        return ", ".join(words)

    def post(self, message: Message) -> None:
        """A step or a start arrives."""
        if isinstance(message, StartExecutor):
            self._start(message.epoch)
            return
        assert isinstance(message, ExecuteStep), message
        self._current.queue.append(message)
        self._turn_to_next(self._current)

    def _start(self, epoch: Epoch) -> None:
        before = self._current
        if epoch < before.model.epoch or (epoch == before.model.epoch and epoch):
            return
        current = self._current = _Incarnation(self._make_model(epoch))
        # Steps of the new epoch that overtook its start; those of the old one are the old one's.
        current.queue.extend(step for step in before.queue if step.epoch >= epoch)
        before.queue = deque(step for step in before.queue if step.epoch < epoch)
        if before.frozen_until_ns <= self._agenda.now_ns and not before.is_cut_off:
            before.is_dead = True
        self._agenda.add(
            self._agenda.now_ns + int(self._random() * self._load_ns), 0, partial(self._become_ready, current)
        )

    def _become_ready(self, incarnation: _Incarnation) -> None:
        if incarnation.is_dead or self._is_put_off(incarnation, partial(self._become_ready, incarnation)):
            return
        incarnation.is_ready = True
        self._send(ExecutorReady(incarnation.model.epoch))
        self._turn_to_next(incarnation)

    def _turn_to_next(self, incarnation: _Incarnation) -> None:
        queue = incarnation.queue
        if incarnation.is_busy or incarnation.is_dead or not incarnation.is_ready:
            return
        while queue and queue[0].epoch < incarnation.model.epoch:
            queue.popleft()
        if queue and queue[0].epoch == incarnation.model.epoch:
            step = queue.popleft()
            incarnation.is_busy = True
            duration_ns = int(self._random() * self._step_ns) + self._step_token_ns * sum(step.num_tokens)
            self._agenda.add(self._agenda.now_ns + duration_ns, 0, partial(self._finish, incarnation, step))

    def _finish(self, incarnation: _Incarnation, step: ExecuteStep) -> None:
        if incarnation.is_dead or self._is_put_off(incarnation, partial(self._finish, incarnation, step)):
            return
        incarnation.is_busy = False
        try:
            self._send(incarnation.model.execute(step))
        except PoisonError as error:
            incarnation.is_dead = True
            self.num_deaths += 1
            self._send(ExecutorFailed(incarnation.model.epoch, str(error)))
        self._turn_to_next(incarnation)

    def _is_put_off(self, incarnation: _Incarnation, action: Callable[[], None]) -> bool:
        if self._agenda.now_ns < incarnation.frozen_until_ns:
            self._agenda.add(incarnation.frozen_until_ns, 0, action)
            return True
        return False

    # -- faults -------------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """Kill the executor that is in service; its end is noticed a little later."""
        current = self._current
        if current.is_dead:
            return
        current.is_dead = True
        self.num_deaths += 1
        self._lose_sent()
        self._notice(current, "killed")

    def hang(self, duration_ns: int) -> None:
        """Let it stand still for a while. Whether it is given up depends on who notices first."""
        current = self._current
        if not current.is_dead and current.frozen_until_ns <= self._agenda.now_ns:
            current.frozen_until_ns = self._agenda.now_ns + duration_ns
            self.num_deaths += 1
            self._notice(current, "hangs")

    def fail_row(self) -> None:
        """Let the next row that samples fail."""
        self._current.model.fail_next = True

    def heal(self) -> None:
        """No more failing rows."""
        self._current.model.fail_next = False

    def notice(self, why: str) -> None:
        """Let whoever watches the executor in service give it up, a little later; it does not know."""
        current = self._current
        current.is_cut_off = True
        self.num_deaths += 1
        self._agenda.add(
            self._agenda.now_ns + int(self._random() * self._notice_ns),
            0,
            lambda: self._send(ExecutorFailed(current.model.epoch, why)) if current is self._current else None,
        )

    def _notice(self, incarnation: _Incarnation, why: str) -> None:
        def tell() -> None:
            is_over = incarnation.is_dead or self._agenda.now_ns < incarnation.frozen_until_ns
            if is_over and incarnation is self._current:
                self._send(ExecutorFailed(incarnation.model.epoch, why))

        self._agenda.add(self._agenda.now_ns + int(self._random() * self._notice_ns), 0, tell)
