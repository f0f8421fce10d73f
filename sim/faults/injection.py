"""What goes wrong in a run, when it does; and what must have been noticed a while later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ...actors.runtime.routes import Address
from ...messages.kv import ResetPrefixCache
from ...messages.system import Drain
from ..agenda import Agenda
from .device import Device
from .losses import Losses
from .network import ADDRESSES, Link, Process, VirtualClock
from .scenario import HEALED_NS, MS, Fault, Scenario
from .supervisor_watch import SupervisorWatch
from .violation import Violation

FOUND_WITHIN_NS = {"stopped": 1_000 * MS, "silent": 2_500 * MS, "computing": 4_000 * MS}
"""By the way in which an executor hangs."""

_PATIENT = {"clock_jump", "stall", "partition", "clog", "pause"}
"""Faults that make the supervisor patient, or deaf."""


class InjectedError(Exception):
    """A defect that was put into an actor."""


class Injection:
    """Brings about the faults of a scenario.

    Args:
        scenario: of the run.
        agenda, clock: virtual time, and what is seen of it.
        links, processes: between and in which things stand still.
        send_as_front_end: says a message in the front end's name.
        losses, device, supervisor: of the run.
        is_over: whether nothing is left that the supervisor could have a part in.

    Attributes:
        defective: the actor whose next message finds a defect; None: there is no such.
        has_defect: whether one was found.
    """

    def __init__(
        self,
        scenario: Scenario,
        agenda: Agenda,
        clock: VirtualClock,
        *,
        links: Mapping[tuple[str, str], Link],
        processes: Mapping[str, Process],
        send_as_front_end: Callable[[ResetPrefixCache | Drain], None],
        losses: Losses,
        device: Device,
        supervisor: SupervisorWatch,
        is_over: Callable[[], bool],
    ) -> None:
        self._scenario = scenario
        self._agenda = agenda
        self._clock = clock
        self._links = links
        self._processes = processes
        self._send_as_front_end = send_as_front_end
        self._losses = losses
        self._device = device
        self._supervisor = supervisor
        self._is_over = is_over
        self.defective: Address | None = None
        self.has_defect = False

    def begin(self) -> None:
        """Have each fault come when it is due, and what was to go wrong next go well from some time on."""
        for fault in self._scenario.faults:
            self._agenda.add(fault.at_ns, 0, partial(self._inject, fault))
        self._agenda.add(HEALED_NS, 0, self._heal)

    def meet_defect(self, address: Address) -> None:
        """An actor handles a message; raises if it is the one with the defect."""
        if address == self.defective:
            self.defective = None
            self.has_defect = True
            raise InjectedError(f"a defect of the {address}")

    def _heal(self) -> None:
        self._device.heal()
        self._losses.heal()

    def _inject(self, fault: Fault) -> None:
        match fault.kind:
            case "fail_row":
                self._device.fail_row()
            case "clock_jump":
                self._clock.jumped_ns += fault.duration_ns
            case "clog":
                links = list(self._links.values())
                link = links[int(fault.choice * len(links))]
                link.clogged_until_ns = self._agenda.now_ns + fault.duration_ns
            case "stall":
                processes = list(self._processes.values())
                self._stall(processes[int(fault.choice * len(processes))], fault.duration_ns)
            case "pause":
                for process in self._processes.values():
                    self._stall(process, fault.duration_ns)
                self._device.pause(fault.duration_ns)
            case "reset_cache":
                self._send_as_front_end(ResetPrefixCache())
            case "drain":
                self._send_as_front_end(Drain())
            case "defect":
                actors = [address for address in ADDRESSES if address != "executor"]
                self.defective = actors[int(fault.choice * len(actors))]
            case _:
                self._losses.inject(fault)
                if fault.kind == "hang":
                    self._expect_found()

    def _stall(self, process: Process, duration_ns: int) -> None:
        until_ns = self._agenda.now_ns + duration_ns
        process.loop.stalled_until_ns = max(process.loop.stalled_until_ns, until_ns)

    def _expect_found(self) -> None:
        """A hang that lasts is found in time, unless something else makes the supervisor patient, or deaf."""
        if self._scenario.topology == "one":
            return  # a thread that hangs is waited for
        number = self._device.number_in_service
        way = self._device.hang_way(number)
        within_ns = FOUND_WITHIN_NS.get(way or "", 0)
        is_calm = not any(each.kind in _PATIENT for each in self._scenario.faults)
        # One that is loading yet may be silent for long.
        if within_ns and self._device.hangs_for_ns(number) > within_ns and is_calm and self._device.is_ready:
            check = partial(self._check_found, number, way or "")
            self._agenda.add(self._agenda.now_ns + within_ns, 0, check)

    def _check_found(self, number: int, way: str) -> None:
        is_found = not self._device.is_in_service(number) or self._supervisor.has_given_up
        if not is_found and not self._is_over():
            raise Violation("a process that hangs is not found in time", f"process {number}, {way}")
