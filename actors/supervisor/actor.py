"""Carries out what the supervisor decides: starts, kills and watches processes, and tells it of them and of time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Protocol

import structlog

from ...messages.base import Message
from ...messages.system import (
    KillProcess,
    ProcessExited,
    ProcessHalted,
    ProcessObserved,
    ProcessStarted,
    StartProcess,
    StopAll,
    StopProcess,
    SupervisorGaveUp,
    Tick,
)
from ..runtime.awake_time import wait_awake
from ..runtime.clock import Clock, MonotonicClock
from ..runtime.process_state import is_stopped
from ..runtime.processes import Nursery, ProcessExit, ProcessRefusedError, ProcessSpec, ProcessStartError
from ..runtime.thread_times import Spent, ThreadTimes, read_threads, spent_between
from .config import TICK_NS, ChildKind, SupervisorConfig
from .core import SupervisorCore

log = structlog.get_logger("octavo.supervisor")

_KILL_S = 10.0
"""After the grace, for SIGKILL to be obeyed."""


_LAST_WORDS_S = 0.02
"""What one said before it died may be read behind the news of its exit: above all, that it was ready."""


class Process(Protocol):
    """A process that was started, here or elsewhere."""

    @property
    def pid(self) -> int: ...  # on its own host; 0 if it is not known

    @property
    def is_here(self) -> bool: ...  # on this host

    def kill(self, signum: int = signal.SIGKILL) -> None: ...

    async def wait(self) -> ProcessExit: ...

    async def stop(self, grace_s: float = 5.0) -> ProcessExit: ...


class Elsewhere(Protocol):
    """Starts children that no nursery forks: on other hosts, or to outlive this process."""

    def hosts(self, child: str) -> bool:
        """Whether a child is one of those."""
        ...

    def is_out_of_reach(self, child: str) -> bool:
        """Whether nothing is heard of the host of a child, either."""
        ...

    async def spawn(self, spec: ProcessSpec) -> Process:
        """Start a child, once there is a place for it; raises `ProcessStartError` if there is none in time."""
        ...

    def withdraw(self, child: str) -> None:
        """Nobody needs any more what was asked to be spawned; if it has no place yet, that fails."""
        ...


class Supervisor:
    """A `SupervisorCore` with real processes, on the running loop.

    Args:
        config: with the children to keep alive; a child of kind `nursery` is the nursery that the others are forked by;
            without one, all are elsewhere.
        make_spec: what a child is started as. Called in the order of the core's messages, so it is also where to
            connect to the new incarnation.
        send: where what the core says to other actors goes (`StartExecutor`, `ExecutorLost`, `EngineLost`,
            `SupervisorGaveUp`).
        modules: imported by the nursery, so that the children need not.
        elsewhere: who starts some of the children; None: the nursery starts all.
        clock: monotonic.
        read_threads: what the threads of a process of this host were at, by pid.
        on_change: called after a message that changed whether the core is ready.
        on_exit: called with name and incarnation of each child that has ended, before the core hears of it.
    """

    def __init__(
        self,
        config: SupervisorConfig,
        *,
        make_spec: Callable[[StartProcess], ProcessSpec],
        send: Callable[[Message], None],
        modules: Sequence[str] = (),
        elsewhere: Elsewhere | None = None,
        clock: Clock | None = None,
        read_threads: Callable[[int], Mapping[int, ThreadTimes]] = read_threads,
        on_change: Callable[[], None] = lambda: None,
        on_exit: Callable[[str, int], None] = lambda child, incarnation: None,
    ) -> None:
        self.core = SupervisorCore(config)
        self.nursery = Nursery(modules, self._on_nursery_lost)
        self._kinds: dict[str, ChildKind] = {child.name: child.kind for child in config.children}
        self._make_spec = make_spec
        self._send = send
        self._clock = clock or MonotonicClock()
        self._read_threads = read_threads
        self._looks: dict[str, tuple[int, int, Mapping[int, ThreadTimes]]] = {}  # when, at which incarnation, and what
        self._on_change = on_change
        self._on_exit = on_exit
        self._elsewhere = elsewhere
        self._processes: dict[str, Process] = {}
        self._incarnations: dict[str, int] = {}  # of `_processes`
        self._doomed: dict[str, int] = {}  # child -> incarnation that is to die as soon as it is there
        self._nursery_incarnation = 0
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._ticker: asyncio.TimerHandle | None = None
        self._waker: asyncio.TimerHandle | None = None
        self._stopped = asyncio.Event()

    def process(self, child: str) -> Process | None:
        """The running process of a child; None between two incarnations."""
        return self._processes.get(child)

    async def start(self) -> None:
        """Start the nursery, then, without waiting for them, the children.

        Raises:
            ProcessStartError: the nursery cannot be started; what it lacks, it will lack at the next start as well.
        """
        if "nursery" in self._kinds.values():
            await self.nursery.start()
        self._tick()

    def handle(self, message: Message) -> None:
        """Take a message for the supervisor, from another actor or a child."""
        was_ready = self.core.is_ready
        for answer in self.core.handle(message, self._clock.now_ns()):
            self._obey(answer)
        if self.core.is_ready != was_ready:
            self._on_change()
        self._arm_waker()
        if self.core.is_stopped:
            self._stopped.set()

    async def stop(self, grace_s: float = 5.0) -> None:
        """End every child, politely for `grace_s` seconds, and the nursery. Safe to call twice."""
        if not self.core.is_stopped:
            self.handle(StopAll(int(grace_s * 1e9)))
            # Those that run have a grace and then SIGKILL, those about to start are killed when they are there.
            with contextlib.suppress(TimeoutError):
                await wait_awake(self._stopped.wait(), grace_s + _KILL_S)
        for timer in (self._ticker, self._waker):
            if timer is not None:
                timer.cancel()
        self._ticker = self._waker = None
        await self.nursery.close()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=_KILL_S)

    def _obey(self, message: Message) -> None:
        if isinstance(message, StartProcess):
            self._start(message)
        elif isinstance(message, KillProcess):
            log.warning("process.killed", child=message.child, incarnation=message.incarnation, why=message.why)
            self._kill(message)
        elif isinstance(message, StopProcess):
            self._stop(message)
        else:
            if isinstance(message, SupervisorGaveUp):
                log.error("supervisor.gave_up", kind=message.kind, why=message.why)
            self._send(message)

    def _start(self, message: StartProcess) -> None:
        if self._kinds[message.child] == "nursery":
            self._nursery_incarnation = message.incarnation
            self._run(self._start_nursery(message), message)
            return
        try:
            spec = self._make_spec(message)
        except Exception as error:  # whatever it is: a child that cannot be described cannot be started
            log.exception("process.not_described", child=message.child)
            exited = ProcessExited(message.child, message.incarnation, f"{type(error).__name__}: {error}")
            asyncio.get_running_loop().call_soon(self.handle, exited)
        else:
            self._run(self._spawn(message, spec), message)

    async def _spawn(self, message: StartProcess, spec: ProcessSpec) -> None:
        try:
            if self._elsewhere is not None and self._elsewhere.hosts(message.child):
                process: Process = await self._elsewhere.spawn(spec)
            else:
                process = await self.nursery.spawn(spec)
        except ProcessStartError as error:
            self._doomed.pop(message.child, None)
            log.error("process.not_started", child=message.child, incarnation=message.incarnation, why=str(error))
            was_refused = isinstance(error, ProcessRefusedError)
            self._note_exit(message, str(error), was_refused=was_refused, is_innocent=True)
            return
        self._processes[message.child] = process
        self._incarnations[message.child] = message.incarnation
        log.info("process.started", child=message.child, incarnation=message.incarnation, pid=process.pid)
        if self._doomed.pop(message.child, 0) == message.incarnation:
            process.kill()
        self.handle(ProcessStarted(message.child, message.incarnation, process.pid))
        ended = await process.wait()
        del self._processes[message.child], self._incarnations[message.child]
        log.info("process.exited", child=message.child, incarnation=message.incarnation, why=ended.why)
        if self.core.is_starting(message.child, message.incarnation):
            await asyncio.sleep(_LAST_WORDS_S)
        self._note_exit(message, ended.why, is_innocent=ended.is_innocent)

    def _note_exit(
        self, message: StartProcess, why: str, *, was_refused: bool = False, is_innocent: bool = False
    ) -> None:
        self._on_exit(message.child, message.incarnation)
        self.handle(ProcessExited(message.child, message.incarnation, why, was_refused, is_innocent))

    async def _start_nursery(self, message: StartProcess) -> None:
        try:
            await self.nursery.start()
        except ProcessStartError as error:
            was_refused = isinstance(error, ProcessRefusedError)
            self.handle(ProcessExited(message.child, message.incarnation, str(error), was_refused))
        else:
            self.handle(ProcessStarted(message.child, message.incarnation, self.nursery.pid))

    def _kill(self, message: KillProcess) -> None:
        if self._kinds[message.child] == "nursery":
            self._end_nursery()
        elif (process := self._processes.get(message.child)) is not None:
            process.kill()
        else:
            self._doom(message)

    def _doom(self, message: KillProcess | StopProcess) -> None:
        self._doomed[message.child] = message.incarnation
        if self._elsewhere is not None and self._elsewhere.hosts(message.child):
            self._elsewhere.withdraw(message.child)

    def _stop(self, message: StopProcess) -> None:
        if self._kinds[message.child] == "nursery":
            self._run(self._close_nursery(message))
        elif (process := self._processes.get(message.child)) is not None:
            self._run(_stop_process(process, message.grace_ns / 1e9))
        else:
            self._doom(message)

    async def _close_nursery(self, message: StopProcess) -> None:
        """End the nursery once its children have ended, whom it would take with it."""
        for child, process in list(self._processes.items()):
            if self._elsewhere is not None and self._elsewhere.hosts(child):
                continue
            await process.wait()  # each was told to end, and is killed if it does not
        await self.nursery.close()
        self.handle(ProcessExited(message.child, message.incarnation, "was stopped"))

    def _end_nursery(self) -> None:
        if self.nursery.pid:
            os.kill(self.nursery.pid, signal.SIGKILL)

    def _on_nursery_lost(self) -> None:
        log.error("nursery.lost")
        for child, kind in self._kinds.items():
            if kind == "nursery":
                self.handle(ProcessExited(child, self._nursery_incarnation, "died"))

    def _run(self, work: Coroutine[object, object, None], start: StartProcess | None = None) -> None:
        """Carry on with something; with `start` it is what sees the exit of the child that it starts."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None  # the loop itself holds tasks weakly
        task.add_done_callback(partial(self._on_done, start))

    def _on_done(self, start: StartProcess | None, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if task.cancelled() or (error := task.exception()) is None:
            return
        asyncio.get_running_loop().call_exception_handler(
            {"message": "the supervisor's carrier failed", "exception": error, "task": task}
        )
        if start is not None:
            self._lose_sight(start, error)

    def _lose_sight(self, start: StartProcess, error: BaseException) -> None:
        """Nobody would see a child's exit any more: it counts as lost from now on, and does not go on unseen."""
        why = f"is out of sight: {type(error).__name__}: {error}"
        if self._kinds[start.child] == "nursery":
            self.handle(ProcessExited(start.child, start.incarnation, why))
            return
        self._doomed.pop(start.child, None)
        if self._incarnations.get(start.child) == start.incarnation:
            del self._incarnations[start.child]
            self._processes.pop(start.child).kill()
        self._note_exit(start, why, is_innocent=True)

    def _tick(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(TICK_NS / 1e9, self._tick)
        for news in (*self._find_halted(), *self._observe_suspects()):
            self.handle(news)
        self.handle(Tick())

    def _find_halted(self) -> list[ProcessHalted]:
        """Children of this host that are stopped; a nursery, too, which has no beats to be missed."""
        halted = [
            ProcessHalted(child, self._incarnations[child])
            for child, process in self._processes.items()
            if process.is_here and process.pid and is_stopped(process.pid)
        ]
        if self.nursery.pid and is_stopped(self.nursery.pid):
            halted += [
                ProcessHalted(child, self._nursery_incarnation)
                for child, kind in self._kinds.items()
                if kind == "nursery"
            ]
        return halted

    def _observe_suspects(self) -> list[ProcessObserved]:
        """What children were at that may hang, since the last look at them."""
        looks, self._looks = self._looks, {}
        observed = []
        for child, process in self._processes.items():
            now_ns, incarnation = self._clock.now_ns(), self._incarnations[child]
            if not self.core.is_suspect(child, now_ns):
                continue
            threads = self._read_threads(process.pid) if process.is_here else {}
            self._looks[child] = (now_ns, incarnation, threads)
            then_ns, incarnation_then, before = looks.get(child, (0, -1, {}))
            if incarnation_then != incarnation:
                continue
            elapsed_ns = now_ns - then_ns
            spent = spent_between(before, threads, elapsed_ns)
            if not process.is_here and self._elsewhere is not None and self._elsewhere.is_out_of_reach(child):
                spent = Spent(0, elapsed_ns)
            observed.append(ProcessObserved(child, incarnation, spent.ran_ns, spent.hindered_ns))
        return observed

    def _arm_waker(self) -> None:
        """Tick also when a child is due, not up to a tick later."""
        if self._waker is not None:
            self._waker.cancel()
            self._waker = None
        if (wake_at_ns := self.core.wake_at_ns) >= 0 and self._ticker is not None:
            delay_s = max(0, wake_at_ns - self._clock.now_ns()) / 1e9
            self._waker = asyncio.get_running_loop().call_later(delay_s, self.handle, Tick())


async def _stop_process(process: Process, grace_s: float) -> None:
    await process.stop(grace_s)
