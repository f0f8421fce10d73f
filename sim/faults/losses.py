"""How executor and engine get lost in a run, and what of their words with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from ...actors.ledger.core import LedgerCore
from ...actors.runtime.routes import Address
from ...messages.base import Message
from ...messages.request import RequestEnded, StopMatched
from ...messages.step import StepExecuted
from ...messages.system import Drain, EngineLost, ExecutorFailed, StartExecutor
from ..agenda import Agenda
from .device import Device
from .garble import NUM_WAYS, garble
from .network import Link, Process, VirtualClock
from .ring_watch import RingWatch
from .scenario import Fault, Scenario, stream
from .supervisor_watch import SupervisorWatch


class Losses:
    """Loses executors, engines and their words as faults ask for it, and brings a new engine up in a lost one's place.

    Args:
        send_as_executor: how the executor's words go to the scheduler.
        begin_ring: called when a new engine stands in the place of a lost one.

    Attributes:
        ring: the engine that lives, or that has died last.
        is_over: the run has broken off; nothing is brought up any more.
        engine_is_down: nobody hears what is said to scheduler and allocator.
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
        supervisor: SupervisorWatch,
        ring: RingWatch,
        send_as_executor: Callable[[Message], None],
        begin_ring: Callable[[RingWatch], None],
    ) -> None:
        self._scenario = scenario
        self._agenda = agenda
        self._clock = clock
        self._places = places
        self._processes = processes
        self._links = links
        self._ledger = ledger
        self._supervisor = supervisor
        self._send_as_executor = send_as_executor
        self._begin_ring = begin_ring
        self._notice_random = stream(scenario.seed, "notice").random
        self._has_engine_process = places["scheduler"] != places["frontend"]
        self._dies_at_an_end = False  # before it can tell of it
        self._garble_way = -1  # how the next results are garbled
        self._loses_result = False  # the next results get lost
        self.ring = ring
        self.is_over = False
        self.engine_is_down = False
        self.device: Device  # which says what it has to say through here

    def inject(self, fault: Fault) -> None:
        """Bring about an `engine_lost`, `garble`, `lose_result`, `partition` or `lose_results`."""
        match fault.kind:
            case "engine_lost" if fault.choice < 0.5:
                self.lose_engine()
            case "engine_lost":
                self._dies_at_an_end = self._has_engine_process
            case "garble":
                self._garble_way = int(fault.choice * NUM_WAYS)
            case "lose_result":
                self._loses_result = True
            case "partition" | "lose_results":
                self._cut_off(fault)

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
                self.device.notice("it does not answer")
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

    def _cut_off(self, fault: Fault) -> None:
        """Executor and engine do not hear each other; who watches the executor gives it up, which it cannot know."""
        if not self._has_engine_process:
            return
        until_ns = self._agenda.now_ns + fault.duration_ns
        executor, engine = self._places["executor"], self._places["scheduler"]
        if fault.kind == "partition":
            for (sender, receiver), link in self._links.items():
                if executor in {sender, receiver} and self._places["supervisor"] not in {sender, receiver}:
                    link.clogged_until_ns = until_ns
            self.device.notice("no word from it")
            return
        self.ring.is_link_lossy = True
        self._links[executor, engine].lost_until_ns = until_ns
        # An executor that is started meanwhile is not heard either.
        self._agenda.add(until_ns, 0, partial(self.device.notice, "no word from it"))

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

    def lose_engine(self) -> None:
        """Scheduler and allocator die."""
        if not self._has_engine_process or self.engine_is_down:
            return
        self.engine_is_down = True
        self.device.num_deaths += 1  # its KV is worth nothing any more
        self._agenda.add(self._agenda.now_ns, 0, self._lose_last_words)
        notice_ns = int(self._notice_random() * self._scenario.notice_ns)
        self._agenda.add(self._agenda.now_ns + notice_ns, 0, self._replace_engine)

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
        for name in engine_places:
            for box in self._processes[name].mailboxes.values():
                box.lose_all()

    def _replace_engine(self) -> None:
        """A new engine takes up every live request, under an epoch that the executor begins with it."""
        if self.is_over:
            return
        now_ns = self._clock.now_ns()
        answers = self._supervisor.handle(ExecutorFailed(self._supervisor.epoch, "the engine was lost"), now_ns)
        epoch = next((answer.epoch for answer in answers if isinstance(answer, StartExecutor)), None)
        if epoch is None:
            return  # it has given up
        self._lose_what_is_under_way()
        self.ring = RingWatch(self._scenario, epoch, self.ring)
        self._begin_ring(self.ring)
        self.engine_is_down = False
        tell = self._processes[self._places["frontend"]].runtime.send
        for answer in answers:
            tell("supervisor", answer)
        for message in self._ledger.handle(EngineLost(epoch, "killed"), now_ns):
            tell("detokenizer" if isinstance(message, StopMatched) else "tokenizer", message)
        if self.ring.is_to_drain:
            tell("frontend", Drain())
