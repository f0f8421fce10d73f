"""The supervisor's children under virtual time: engine and executor start, beat, are looked at, and end.

This is the part of the carrier around `SupervisorCore`. It says what a real one would see: beats, exits, processes that
are stopped, and what silent ones are at. What follows from that, and when, the core alone decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ...actors.engine.report import Reporter
from ...actors.supervisor.config import TICK_NS, ChildConfig
from ...actors.supervisor.lost_steps import LostStepWatch
from ...messages.base import Message
from ...messages.processes import EngineReport
from ...messages.system import (
    Beat,
    EngineReady,
    KillProcess,
    ProcessExited,
    ProcessHalted,
    ProcessObserved,
    ProcessStarted,
    StartProcess,
    Tick,
)
from ..agenda import Agenda
from .device import EXECUTOR, Device
from .losses import Losses
from .network import Link, VirtualClock
from .scenario import Scenario
from .supervisor_watch import SupervisorWatch

ENGINE = "engine"
CHILDREN = (ChildConfig(ENGINE, "engine"), ChildConfig(EXECUTOR, "executor"))

BEAT_NS = 250_000_000
QUIET_NS = 500_000_000
"""For so long a host is not heard before it counts as out of reach."""
LOST_HOST_NS = 1_600_000_000
"""For so long before it counts as lost, and its processes with it."""


class Lines(NamedTuple):
    """How news come to the supervisor.

    Attributes:
        tell: from its own process.
        beats: from the executor's thread of beats, which has a socket of its own.
        tell_from_engine: from the engine.
    """

    tell: Callable[[Message], None]
    beats: Link
    tell_from_engine: Callable[[Message], None]


class Children:
    """Carries out what the supervisor decides, and tells it of its children and of time.

    Args:
        scenario: of the run.
        agenda, clock: virtual time, and what is seen of it.
        rng: how long a start or the news of an exit take.
        supervisor: of whom it is asked which child is worth a look.
        device: the executor's processes.
        lines: to the supervisor.
        engine: how engines come and go, and what they are at.
        is_over: whether nothing will happen any more that the supervisor could have a part in.
    """

    def __init__(
        self,
        scenario: Scenario,
        agenda: Agenda,
        clock: VirtualClock,
        rng: random.Random,
        *,
        supervisor: SupervisorWatch,
        device: Device,
        lines: Lines,
        engine: Losses,
        is_over: Callable[[], bool],
    ) -> None:
        self._scenario = scenario
        self._agenda = agenda
        self._clock = clock
        self._random = rng.random
        self._supervisor = supervisor
        self._device = device
        self._tell, self._beats, self._tell_from_engine = lines
        self._losses = engine
        self._is_over = is_over
        self._engine = (0, False)  # incarnation, and whether it lives
        self._executor = 0
        self._exits: dict[tuple[str, int], None] = {}  # told, or about to be
        self._looked_ns: dict[tuple[str, int], int] = {}
        self._wake_at_ns = -1
        self._lost_steps = LostStepWatch()
        self._reporter = Reporter(0)

    def start(self) -> None:
        """Time begins."""
        self._tick()

    # -- what the supervisor decides ----------------------------------------------------------------------------------

    def start_process(self, message: StartProcess) -> None:
        """Start a child."""
        if message.child == EXECUTOR:
            self._executor = message.incarnation
            self._device.start_process(message.incarnation, message.epoch)
            self._beat_of_executor(message.incarnation)
        else:
            self._engine = (message.incarnation, True)
            is_first = message.incarnation == 1
            self._losses.prepare_engine(message.epoch)
            delay_ns = 0 if is_first else int(self._random() * self._scenario.load_ns)
            self._agenda.add(self._agenda.now_ns + delay_ns, 0, partial(self._begin_engine, message.incarnation))
        self._tell(ProcessStarted(message.child, message.incarnation, 1))

    def _begin_engine(self, incarnation: int) -> None:
        if self._engine == (incarnation, True):
            self._reporter = Reporter(incarnation)
            self._tell_from_engine(EngineReady(incarnation))
            self._beat_of_engine(incarnation)

    def kill_process(self, message: KillProcess) -> None:
        """End a child at once."""
        child, number = message.child, message.incarnation
        if child == ENGINE:
            if self._engine == (number, True):
                self._losses.lose_silent_engine(has_given_up=self._supervisor.has_given_up)
            return
        if not self._device.is_alive(number):
            return  # its exit is known, or on its way
        is_heard = not self._device.out_of_reach_ns(number)
        self._device.kill(number)
        if is_heard:  # else nobody hears whether it ends, until it counts as gone with its host
            self.note_executor_exit(number, "was killed by SIGKILL")

    # -- what it hears ------------------------------------------------------------------------------------------------

    def note_executor_exit(self, number: int, why: str) -> None:
        """A process of the executor has ended."""
        self._note_exit(EXECUTOR, number, why, int(self._random() * self._scenario.notice_ns))

    def note_engine_exit(self) -> None:
        """The engine's process has ended."""
        number, _ = self._engine
        self._engine = (number, False)
        self._note_exit(ENGINE, number, "was killed by SIGKILL", int(self._random() * self._scenario.notice_ns))

    def _note_exit(self, child: str, number: int, why: str, delay_ns: int, *, is_innocent: bool = False) -> None:
        if (child, number) in self._exits:
            return
        self._exits[child, number] = None
        told = ProcessExited(child, number, why, is_innocent=is_innocent)
        self._agenda.add(self._agenda.now_ns + delay_ns, 0, partial(self._tell, told))

    def _beat_of_executor(self, number: int) -> None:
        if self._is_over() or not self._device.is_alive(number):
            return
        self._device.beat(number, self._send_beat)
        self._agenda.add(self._agenda.now_ns + BEAT_NS, 0, partial(self._beat_of_executor, number))

    def _send_beat(self, message: Message) -> None:
        self._beats.send("supervisor", self._tell, message)

    def _beat_of_engine(self, incarnation: int) -> None:
        if self._is_over() or self._engine != (incarnation, True):
            return
        if not self._losses.is_engine_stalled:
            report = self._losses.report_of_engine(self._reporter)
            num_executed = report.num_steps - report.num_steps_in_flight if report is not None else 0
            self._tell_from_engine(Beat(ENGINE, incarnation, progress=1 + num_executed))
            if report is not None:
                self._tell_from_engine(report)
        self._agenda.add(self._agenda.now_ns + BEAT_NS, 0, partial(self._beat_of_engine, incarnation))

    def note(self, message: Beat | EngineReport, now_ns: int) -> None:
        """What the supervisor's process makes of beats and reports beside its core."""
        if isinstance(message, Beat):
            if message.child == EXECUTOR:
                self._lost_steps.note_beat(message, now_ns)
        elif message.incarnation == self._engine[0] and self._lost_steps.is_lost(
            message, is_ready=self._supervisor.is_ready, now_ns=now_ns
        ):
            self._losses.lose_engine_for_step()

    # -- time, and looks at children ----------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._is_over():
            return
        self._agenda.add(self._agenda.now_ns + TICK_NS, 0, self._tick)
        self._look_at_host()
        for child, number in ((ENGINE, self._engine[0]), (EXECUTOR, self._executor)):
            if number and self._supervisor.is_suspect(child, self._clock.now_ns()):
                self._look_at(child, number)
        self._tell(Tick())

    def _look_at_host(self) -> None:
        """What the executor's host knows of it, or that nothing is heard of its host any more."""
        device, number = self._device, self._executor
        if not number:
            return
        if device.out_of_reach_ns(number) > LOST_HOST_NS:
            # Once it is heard again, it is told to end.
            device.kill(number)
            self._note_exit(EXECUTOR, number, "was lost with its host", 0, is_innocent=True)
        elif device.hang_way(number) == "stopped":
            self._tell(ProcessHalted(EXECUTOR, number))

    def _look_at(self, child: str, number: int) -> None:
        """Tell what a child was at since the last look, if that was at a tick before this."""
        now_ns = self._agenda.now_ns
        elapsed_ns = now_ns - self._looked_ns.get((child, number), -TICK_NS)
        self._looked_ns[child, number] = now_ns
        if elapsed_ns != TICK_NS:
            return
        ran_ns = hindered_ns = 0
        if child == EXECUTOR:
            if self._device.out_of_reach_ns(number) > QUIET_NS:
                hindered_ns = elapsed_ns
            elif self._device.hang_way(number) == "computing":
                ran_ns = elapsed_ns
        self._tell(ProcessObserved(child, number, ran_ns, hindered_ns))

    def arm_waker(self) -> None:
        """Tick also when a child is due, not up to a tick later."""
        wake_at_ns = self._supervisor.wake_at_ns
        if wake_at_ns >= 0 and wake_at_ns != self._wake_at_ns:
            delay_ns = max(0, wake_at_ns - self._clock.now_ns())
            self._agenda.add(self._agenda.now_ns + delay_ns, 0, partial(self._tell, Tick()))
        self._wake_at_ns = wake_at_ns
