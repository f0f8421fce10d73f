"""The processes of the executor one after another: they crash, hang, are cut off, and speak when nobody listens."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal

from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.step import ExecuteStep
from ...messages.system import Beat, ExecutorFailed, ExecutorReady, StartExecutor
from ..agenda import Agenda
from .executor_model import ExecutorModel, PoisonError
from .network import VirtualClock
from .scenario import Scenario

EXECUTOR = "executor 0"

HangWay = Literal["stopped", "silent", "computing", "at its step", "paused"]
HANG_WAYS: tuple[HangWay, ...] = ("stopped", "silent", "computing", "at its step")
"""By a signal, which the system knows of; for no reason that shows; in a call that lets no other thread run; while its
beats go on. One that is paused stands still with everybody else."""


class _Process:
    """One process of the executor, or its thread.

    Attributes:
        number: its incarnation.
        is_dead: it executes and says nothing any more.
        is_to_raise: its next step does.
        frozen_until_ns, hang_way: it hangs until then, and how.
        cut_off_until_ns, cut_off_ns: until then it hears nothing and is not heard, and since when.
        num_steps, busy_since_ns, busy_tokens, longest: as its beats say; `busy_since_ns` is -1 between steps.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_dead = False
        self.is_to_raise = False
        self.frozen_until_ns = 0
        self.hang_way: HangWay = "silent"
        self.cut_off_until_ns = 0
        self.cut_off_ns = 0
        self.num_steps = 0
        self.busy_since_ns = -1
        self.busy_tokens = 0
        self.longest = (0, 0)


class _Incarnation:
    """What a process is in one epoch.

    Attributes:
        is_begun: it was told to be.
        is_over: a step raised, or another epoch has begun in its process.
    """

    def __init__(self, model: ExecutorModel, process: _Process) -> None:
        self.model = model
        self.process = process
        self.queue: deque[ExecuteStep] = deque()
        self.is_begun = False
        self.is_ready = False
        self.is_busy = False
        self.is_over = False

    @property
    def is_dead(self) -> bool:
        return self.is_over or self.process.is_dead


class Device:
    """The executor's place in the graph.

    Args:
        scenario: of the run.
        agenda, clock: virtual time, and what is seen of it.
        rng: how long steps take.
        make_model: an empty executor of an epoch.
        is_thread: it shares the engine's process; a crash is then a step that raises.
        send: says a message in the executor's name, whichever of them it is: one that was given up may not know it,
            and goes on speaking; its epoch tells.
        lose_sent: called when an executor is killed: what it said last may never arrive.
        on_exit: called with number and reason of a process that has ended.

    Attributes:
        num_deaths: of executors, or things as good as that.
        num_overtaken: steps that came before the news of the epoch that they belong to.
    """

    def __init__(
        self,
        scenario: Scenario,
        agenda: Agenda,
        clock: VirtualClock,
        rng: random.Random,
        make_model: Callable[[Epoch], ExecutorModel],
        *,
        is_thread: bool,
        send: Callable[[Message], None],
        lose_sent: Callable[[], None],
        on_exit: Callable[[int, str], None],
    ) -> None:
        self._scenario = scenario
        self._agenda = agenda
        self._clock = clock
        self._random = rng.random
        self._make_model = make_model
        self._is_thread = is_thread
        self._send = send
        self._lose_sent = lose_sent
        self._on_exit = on_exit
        self._slow_factor, self._num_slow = 1, 0
        self.num_deaths = 0
        self.num_overtaken = 0
        process = _Process(0)
        process.is_dead = not is_thread  # it has yet to be started; its queue is the first one's
        self._processes = {0: process}
        self._current = _Incarnation(make_model(Epoch(0)), process)

    @property
    def model(self) -> ExecutorModel:
        """Of the executor that is in service."""
        return self._current.model

    def describe(self) -> str:
        """For a report of who waits for whom."""
        current = self._current
        words = [f"process {current.process.number}, epoch {current.model.epoch}", f"{len(current.queue)} steps queued"]
        words += [word for word in ("is_ready", "is_busy", "is_dead") if getattr(current, word)]
        return ", ".join(words)

    # -- what it is told ----------------------------------------------------------------------------------------------

    def post(self, message: Message) -> None:
        """A step or a start arrives."""
        process = self._current.process
        if self._agenda.now_ns < process.cut_off_until_ns:
            self._agenda.add(process.cut_off_until_ns, 0, partial(self._hear, process, message))
        else:
            self._hear(process, message)

    def _hear(self, process: _Process, message: Message) -> None:
        if isinstance(message, StartExecutor):
            self._begin_if_new(process, message.epoch)
            return
        assert isinstance(message, ExecuteStep), message
        self.num_overtaken += message.epoch > self._current.model.epoch
        self._current.queue.append(message)
        self._turn_to_next(self._current)

    def _begin_if_new(self, process: _Process, epoch: Epoch) -> None:
        before = self._current
        if before.process is not process or process.is_dead:
            return  # the next one is told at its start
        if epoch < before.model.epoch or (epoch == before.model.epoch and before.is_begun):
            return
        if not self._is_put_off(process, partial(self._begin_if_new, process, epoch)):
            self._begin(process, epoch)

    def start_process(self, number: int, epoch: Epoch) -> None:
        """A new process takes the place of the one before, which may not know that it was given up."""
        process = self._processes[number] = _Process(number)
        self._begin(process, epoch)

    def _begin(self, process: _Process, epoch: Epoch) -> None:
        before = self._current
        current = self._current = _Incarnation(self._make_model(epoch), process)
        current.is_begun = True
        # Steps of the new epoch that overtook its start; those of the old one are the old one's.
        current.queue.extend(step for step in before.queue if step.epoch >= epoch)
        before.queue = deque(step for step in before.queue if step.epoch < epoch)
        if before.process is process:
            before.is_over = True
            process.busy_since_ns = -1
        delay_ns = int(self._random() * self._scenario.load_ns)
        self._agenda.add(self._agenda.now_ns + delay_ns, 0, partial(self._become_ready, current))

    # -- what it does -------------------------------------------------------------------------------------------------

    def _become_ready(self, incarnation: _Incarnation) -> None:
        if incarnation.is_dead or self._is_put_off(incarnation.process, partial(self._become_ready, incarnation)):
            return
        incarnation.is_ready = True
        self._say(incarnation.process, ExecutorReady(incarnation.model.epoch))
        self._turn_to_next(incarnation)

    def _turn_to_next(self, incarnation: _Incarnation) -> None:
        queue, process = incarnation.queue, incarnation.process
        if incarnation.is_busy or incarnation.is_dead or not incarnation.is_ready:
            return
        while queue and queue[0].epoch < incarnation.model.epoch:
            queue.popleft()
        if queue and queue[0].epoch == incarnation.model.epoch:
            step = queue.popleft()
            incarnation.is_busy = True
            process.busy_since_ns, process.busy_tokens = self._clock.now_ns(), sum(step.num_tokens)
            scenario = self._scenario
            duration_ns = int(self._random() * scenario.step_ns) + scenario.step_token_ns * process.busy_tokens
            if self._num_slow:
                self._num_slow -= 1
                duration_ns *= self._slow_factor
            self._agenda.add(self._agenda.now_ns + duration_ns, 0, partial(self._finish, incarnation, step))

    def _finish(self, incarnation: _Incarnation, step: ExecuteStep) -> None:
        process = incarnation.process
        if incarnation.is_dead or self._is_put_off(process, partial(self._finish, incarnation, step)):
            return
        incarnation.is_busy = False
        took_ns = self._clock.now_ns() - process.busy_since_ns
        process.busy_since_ns = -1
        process.num_steps += 1
        process.longest = max(process.longest, (took_ns, process.busy_tokens))
        if process.is_to_raise:
            process.is_to_raise = False
            self._fail(incarnation, "killed")
            return
        try:
            executed = incarnation.model.execute(step)
        except PoisonError as error:
            if not self._is_thread and self._random() < 0.5:
                self._die(process, str(error))
            else:
                self._fail(incarnation, str(error))
            return
        self._say(process, executed)
        self._turn_to_next(incarnation)

    def _fail(self, incarnation: _Incarnation, why: str) -> None:
        """A step raised, and with it the rest of its epoch is lost."""
        self.num_deaths += 1
        incarnation.is_over = True
        self._say(incarnation.process, ExecutorFailed(incarnation.model.epoch, why))

    def _die(self, process: _Process, why: str) -> None:
        self.num_deaths += 1
        process.is_dead = True
        self._on_exit(process.number, why)

    def _say(self, process: _Process, message: Message) -> None:
        """Have a message leave, once it can."""
        if process.is_dead:
            return
        if self._agenda.now_ns < process.cut_off_until_ns:
            self._agenda.add(process.cut_off_until_ns, 0, partial(self._say, process, message))
        else:
            self._send(message)

    def _is_put_off(self, process: _Process, action: Callable[[], None]) -> bool:
        if self._agenda.now_ns < process.frozen_until_ns:
            self._agenda.add(process.frozen_until_ns, 0, action)
            return True
        return False

    # -- what is seen of its processes --------------------------------------------------------------------------------

    def is_alive(self, number: int) -> bool:
        """Whether a process has not ended."""
        return not self._processes[number].is_dead

    def hang_way(self, number: int) -> HangWay | None:
        """How a process hangs, if it does."""
        process = self._processes[number]
        is_frozen = not process.is_dead and self._agenda.now_ns < process.frozen_until_ns
        return process.hang_way if is_frozen else None

    def hangs_for_ns(self, number: int) -> int:
        """For how long a process will hang still; 0 if it does not."""
        return max(0, self._processes[number].frozen_until_ns - self._agenda.now_ns)

    def out_of_reach_ns(self, number: int) -> int:
        """Since when a process has been cut off; 0 if it is not."""
        process = self._processes[number]
        now_ns = self._agenda.now_ns
        return now_ns - process.cut_off_ns if now_ns < process.cut_off_until_ns else 0

    def beat(self, number: int, send: Callable[[Message], None]) -> None:
        """The thread of a process's beats says one, if it is let."""
        process = self._processes[number]
        if process.is_dead or self.hang_way(number) not in (None, "at its step"):
            return
        longest_ns, longest_tokens = process.longest
        process.longest = (0, 0)
        current = self._current
        beat = Beat(
            EXECUTOR,
            number,
            progress=process.num_steps,
            busy_ns=self._clock.now_ns() - process.busy_since_ns if process.busy_since_ns >= 0 else 0,
            busy_tokens=process.busy_tokens,
            longest_ns=longest_ns,
            longest_tokens=longest_tokens,
            epoch=current.model.epoch if current.process is process else Epoch(0),
        )
        if self._agenda.now_ns < process.cut_off_until_ns:
            self._agenda.add(process.cut_off_until_ns, 0, partial(send, beat))
        else:
            send(beat)

    def kill(self, number: int) -> None:
        """End a process; one that is cut off does not hear of it before it is heard again itself."""
        process = self._processes[number]
        if self._agenda.now_ns < process.cut_off_until_ns:
            self._agenda.add(process.cut_off_until_ns, 0, partial(setattr, process, "is_dead", True))
        else:
            process.is_dead = True

    def is_in_service(self, number: int) -> bool:
        """Whether a process lives and nobody has taken its place."""
        current = self._current.process
        return current.number == number and not current.is_dead

    @property
    def is_ready(self) -> bool:
        """Whether the executor in service has said that it is ready."""
        return self._current.is_ready

    @property
    def number_in_service(self) -> int:
        return self._current.process.number

    # -- faults -------------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """Kill the process that is in service; a thread's next step raises."""
        current = self._current
        if current.is_dead:
            return
        if self._is_thread:
            current.process.is_to_raise = True
            return
        self._lose_sent()
        self._die(current.process, "was killed by SIGKILL")

    def hang(self, duration_ns: int, way: HangWay) -> None:
        """Let it stand still for a while. Whether it is given up depends on who notices first."""
        current, now_ns = self._current, self._agenda.now_ns
        if not current.is_dead and current.process.frozen_until_ns <= now_ns:
            current.process.frozen_until_ns = now_ns + duration_ns
            current.process.hang_way = way
            self.num_deaths += 1

    def pause(self, duration_ns: int) -> None:
        """Let it stand still for a while with all that could notice. It is no worse for it."""
        process, now_ns = self._current.process, self._agenda.now_ns
        if process.frozen_until_ns <= now_ns:
            process.hang_way = "paused"
        process.frozen_until_ns = max(process.frozen_until_ns, now_ns + duration_ns)

    def cut_off(self, duration_ns: int) -> None:
        """Let it neither hear nor be heard for a while; it goes on meanwhile."""
        current, now_ns = self._current, self._agenda.now_ns
        if not current.is_dead and current.process.cut_off_until_ns <= now_ns:
            current.process.cut_off_ns, current.process.cut_off_until_ns = now_ns, now_ns + duration_ns
            self.num_deaths += 1

    def slow_down(self, factor: int, num_steps: int) -> None:
        """Let the next so many steps take so many times as long."""
        self._slow_factor, self._num_slow = factor, num_steps

    def fail_row(self) -> None:
        """Let the next row that samples fail."""
        self._current.model.fail_next = True

    def heal(self) -> None:
        """What was to fail next does not."""
        self._current.model.fail_next = False
        self._current.process.is_to_raise = False
