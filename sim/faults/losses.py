"""How executor and engine get lost in a run, and what of their words with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ...actors.engine.report import Reporter
from ...actors.ledger.core import LedgerCore
from ...actors.runtime.routes import Address
from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.processes import EngineReport
from ...messages.request import RequestEnded, StopMatched
from ...messages.step import StepExecuted
from ...messages.system import Drain, EngineLost
from ..agenda import Agenda
from .device import HANG_WAYS, Device
from .garble import NUM_WAYS, garble
from .network import Link, Process, VirtualClock
from .ring_watch import RingWatch
from .scenario import MS, Fault, Scenario
from .violation import Violation

_LONG_NS = 4_000 * MS
"""What stands still for so long may look as if a step were lost."""

_SILENT_NS = 1_000 * MS
"""What stands still for so long may be taken for dead."""

SLOW_FACTOR = 10
NUM_SLOW_STEPS = 100


class Losses:
    """Loses executors, engines and their words as faults ask for it, and puts a new engine in a lost one's place.

    Args:
        send_as_executor: how the executor's words go to the scheduler.
        begin_ring: called when a new engine stands in the place of a lost one.
        on_engine_exit: called when the engine's process has ended.

    Attributes:
        ring: the engine that lives, or that has died last.
        engine_is_down: nobody hears what is said to scheduler and allocator.
        num_engine_losses: engines that died.
    """

    def __init__(
        self,
        scenario: Scenario,
        agenda: Agenda,
        clock: VirtualClock,
        *,
        places: Mapping[Address, str],
        processes: Mapping[str, Process],
        links: Mapping[tuple[str, str], Link],
        ledger: LedgerCore,
        ring: RingWatch,
        send_as_executor: Callable[[Message], None],
        begin_ring: Callable[[RingWatch], None],
        on_engine_exit: Callable[[], None],
    ) -> None:
        self._scenario = scenario
        self._agenda = agenda
        self._clock = clock
        self._places = places
        self._processes = processes
        self._links = links
        self._ledger = ledger
        self._send_as_executor = send_as_executor
        self._begin_ring = begin_ring
        self._on_engine_exit = on_engine_exit
        self._epoch = Epoch(0)  # of the engine that was started last
        self._has_engine_process = places["scheduler"] != places["frontend"]
        self._is_started = False
        self._dies_at_an_end = False  # before it can tell of it
        self._garble_way = -1  # how the next results are garbled
        self._loses_result = False  # the next results get lost
        self.ring = ring
        self.engine_is_down = False
        self.num_engine_losses = 0
        self.device: Device  # which says what it has to say through here

    def inject(self, fault: Fault) -> None:
        """Bring about what a fault says of executor or engine."""
        match fault.kind:
            case "crash":
                self.device.crash()
            case "hang":
                self.device.hang(fault.duration_ns, HANG_WAYS[int(fault.choice * len(HANG_WAYS))])
            case "slow":
                self.device.slow_down(SLOW_FACTOR, NUM_SLOW_STEPS)
            case "engine_lost" if fault.choice < 0.5:
                self.lose_engine()
            case "engine_lost":
                self._dies_at_an_end = self._has_engine_process
            case "garble":
                self._garble_way = int(fault.choice * NUM_WAYS)
            case "lose_result":
                self._loses_result = self._has_engine_process
            case "partition" if self._has_engine_process:
                self.device.cut_off(fault.duration_ns)
            case "lose_results" if self._has_engine_process:
                self.ring.is_link_lossy = True
                self.device.num_deaths += 1
                link = self._links[self._places["executor"], self._places["scheduler"]]
                link.lost_until_ns = self._agenda.now_ns + fault.duration_ns

    def heal(self) -> None:
        """What was to go wrong next goes well."""
        self._garble_way = -1
        self._loses_result = False
        self._dies_at_an_end = False

    # -- the executor -------------------------------------------------------------------------------------------------

    def send_from_executor(self, message: Message) -> None:
        """Pass on what the executor says, unless it is to be garbled or lost."""
        if isinstance(message, StepExecuted) and not self.engine_is_down and message.epoch == self.ring.epoch:
            if self._loses_result:
                self._loses_result = False
                self.ring.faulty_epochs[message.epoch] = None
                self.device.num_deaths += 1  # or as good as that
                return
            if self._garble_way >= 0 and message.request_ids:
                self.ring.faulty_epochs[message.epoch] = None
                if self._garble_way > 0:  # a row may well be missing, if its request has ended
                    self.ring.garbled[message.epoch, message.step_id] = None
                self.device.num_deaths += 1  # or as good as that
                message = garble(message, self._garble_way, self._scenario.vocab)
                self._garble_way = -1
        self._send_as_executor(message)

    def lose_sent_by_executor(self) -> None:
        """The executor is killed; a thread's words are heard all the same, a process's perhaps not."""
        if self._has_engine_process:
            self._links[self._places["executor"], self._places["scheduler"]].lose_sent()

    # -- the engine ---------------------------------------------------------------------------------------------------

    def handle_scheduler(self, message: Message, now_ns: int) -> Iterable[Message]:
        """What the scheduler answers, if it lives and lives on."""
        if self.engine_is_down:
            return ()
        answers = self.ring.handle_scheduler(message, now_ns)
        if self._dies_at_an_end:
            for index, answer in enumerate(answers):
                if isinstance(answer, RequestEnded):
                    self._dies_at_an_end = False
                    self.lose_engine()
                    return answers[:index]
        return answers

    def handle_allocator(self, message: Message, now_ns: int) -> Iterable[Message]:
        """What the allocator answers, if it lives."""
        return () if self.engine_is_down else self.ring.handle_allocator(message, now_ns)

    @property
    def is_engine_stalled(self) -> bool:
        """Whether the engine's process stands still."""
        return self._processes[self._places["scheduler"]].loop.stalled_until_ns > self._agenda.now_ns

    def report_of_engine(self, reporter: Reporter) -> EngineReport | None:
        """What it tells of itself; None: there is none, or nobody has asked anything of it yet."""
        if self.engine_is_down:
            return None
        ring, now_ns = self.ring, self._clock.now_ns()
        return reporter.report(ring.scheduler, ring.allocator, num_edges_shed=0, messages_dropped=(), now_ns=now_ns)

    @property
    def is_engine_waiting(self) -> bool:
        """Whether it waits for the results of a step."""
        return not self.engine_is_down and self.ring.scheduler.stats().num_steps_in_flight > 0

    def lose_engine(self) -> None:
        """Scheduler and allocator die."""
        if not self._has_engine_process or self.engine_is_down:
            return
        if not self._is_started:  # what is not there yet dies as soon as it is
            self._agenda.add(self._agenda.now_ns + MS, 0, self.lose_engine)
            return
        self.engine_is_down = True
        self.num_engine_losses += 1
        self.device.num_deaths += 1  # its KV is worth nothing any more
        self._agenda.add(self._agenda.now_ns, 0, self._lose_last_words)
        self._on_engine_exit()

    def lose_engine_for_step(self) -> None:
        """The engine is killed, for it waits for a step that nobody is at."""
        faults = self._scenario.faults
        if not any(
            fault.kind in {"lose_result", "lose_results", "partition"}
            or (fault.duration_ns >= _LONG_NS and fault.kind != "pause")
            for fault in faults
        ):
            raise Violation("a step is lost and nothing has lost it", self.device.describe())
        self.lose_engine()

    def lose_silent_engine(self, *, has_given_up: bool) -> None:
        """The supervisor has the engine killed."""
        is_silent = any(
            fault.kind in {"stall", "clog"} and fault.duration_ns >= _SILENT_NS for fault in self._scenario.faults
        )
        if not is_silent and not has_given_up:
            raise Violation("an engine is killed that nothing had happened to")
        self.lose_engine()

    @property
    def _engine_places(self) -> dict[str, None]:
        return {self._places["scheduler"]: None, self._places["kv_allocator"]: None}

    def _lose_last_words(self) -> None:
        """Of what scheduler and allocator said last, what they were just saying included, not everything arrives."""
        for (sender, _), link in self._links.items():
            if sender in self._engine_places:
                link.lose_sent()

    def _lose_what_is_under_way(self) -> None:
        """Whatever the dead engine said or would have heard is gone with its links and mailboxes."""
        edge, engine_places = self._places["frontend"], self._engine_places
        for (sender, receiver), link in self._links.items():
            if (receiver in engine_places and sender != self._places["executor"]) or (
                sender in engine_places and receiver in {edge, *engine_places}
            ):
                link.lose_sent(0)
            if receiver in engine_places or sender in engine_places:
                link.renew()
        for name in engine_places:
            self._processes[name].renew()

    def prepare_engine(self, epoch: Epoch) -> None:
        """A new process is started, to begin with this epoch; nobody but the supervisor hears of it yet."""
        self._epoch = epoch
        self._is_started = True
        if self.num_engine_losses:
            self._lose_what_is_under_way()

    def put_in_place(self) -> None:
        """The new engine hears what is said from now on."""
        self._lose_what_is_under_way()
        self.ring = RingWatch(self._scenario, self._epoch, self.ring)
        self._begin_ring(self.ring)
        self.engine_is_down = False

    def take_up_again(self, lost: EngineLost) -> None:
        """Submit every live request to the new engine."""
        tell = self._processes[self._places["frontend"]].runtime.send
        for message in self._ledger.handle(lost, self._clock.now_ns()):
            tell("detokenizer" if isinstance(message, StopMatched) else "tokenizer", message)
        if self.ring.is_to_drain:
            tell("frontend", Drain())
