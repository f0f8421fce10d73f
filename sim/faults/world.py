"""One run of a scenario: the production actors in their processes, their clients, and what goes wrong."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from ...actors.runtime.routes import Address
from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.processes import EngineReport
from ...messages.step import PlanDue
from ...messages.system import (
    Beat,
    EngineLost,
    ExecutorLost,
    KillProcess,
    StartExecutor,
    StartProcess,
)
from ..agenda import Agenda
from .children import CHILDREN, Children, Lines
from .clients import FrontEndModel
from .device import Device
from .edge_side import EdgeSide
from .excuses import Excuses
from .executor_model import ExecutorModel
from .injection import InjectedError, Injection
from .losses import Losses
from .network import ADDRESSES, Link, Process, VirtualClock
from .places import PLACES
from .ring_watch import RingWatch, check_nothing_left
from .scenario import HEALED_NS, MS, Scenario, stream
from .supervisor_watch import SupervisorWatch
from .trace import RunHash, describe_event
from .violation import Violation, as_violation
from .waits import describe_waits

TICK_NS = 250 * MS
"""How often deadlines are looked at while nothing else happens, as in the engine."""

REPEAT_NS = 2 * MS
"""When a supervisor tells again of a loss, under a transport that duplicates."""

MAX_EVENTS = 60_000
MAX_NS = 300_000 * MS
"""Everything has ended long before this, hangs and clogs included, or never will."""

LIVENESS_NS = 150_000 * MS
"""So long behind the last fault the supervisor's time goes on, if something is open still."""


class RunResult(msgspec.Struct, frozen=True):
    """What became of a scenario.

    Attributes:
        hash: of every message handled: when, by whom, and its ids.
        num_events: entries of the agenda that were run.
        kind, detail: of the violation; empty if all was well.
        events: the last ones, or all, in words; only if asked for.
        waits: who waits for whom; only if the run did not come to its end.
    """

    hash: str
    num_events: int
    kind: str = ""
    detail: str = ""
    events: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()


class World:
    """Everything of one run.

    Args:
        scenario: what happens.
        max_recorded: how many of the last events to keep for a report.
    """

    def __init__(self, scenario: Scenario, max_recorded: int = 0) -> None:
        self.scenario = scenario
        self._agenda = Agenda()
        self._clock = VirtualClock(self._agenda)
        self._violation: Violation | None = None
        self._is_broken = False
        self._hash = RunHash()
        self._recorded: deque[tuple[int, Address, Message]] = deque(maxlen=max_recorded)
        self._records = max_recorded > 0

        self._excuses = Excuses(scenario, RingWatch(scenario))
        self._links: dict[tuple[str, str], Link] = {}
        self._is_defect_told = False
        self._places = PLACES[scenario.topology]
        self._has_engine_process = self._places["scheduler"] != self._places["frontend"]
        self._edge = EdgeSide(
            scenario,
            self._clock,
            client_of=lambda request_id: self._front_end.streams[request_id].client,
            has_ledger=self._has_engine_process,
        )
        self._ledger, self._oracles = self._edge.ledger, self._edge.oracles
        children = CHILDREN if self._has_engine_process else ()
        self._supervisor = SupervisorWatch(scenario.max_restarts, children, self._break)
        beginnings = [0, *(client.at_ns for client in scenario.clients), *(fault.at_ns for fault in scenario.faults)]
        self._all_begun_ns = max(beginnings)
        self._children: Children | None = None
        self._build()

    # -- building -----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        scenario, agenda, places = self.scenario, self._agenda, self._places
        hops = stream(scenario.seed, "hops")
        processes = self._processes = {
            name: Process(agenda, self._clock, hops, hop_ns=scenario.hop_ns, on_failure=self._on_failure)
            for name in dict.fromkeys(places.values())
        }
        self._front_end = FrontEndModel(
            agenda,
            self._clock,
            oracles=self._oracles,
            vocabulary=self._edge.vocabulary,
            send=partial(processes[places["frontend"]].runtime.send, "frontend"),
            may_end_so=self._excuses.allow,
            max_prompt=scenario.scheduler.max_sequence_len - 1,
        )
        home = processes[places["executor"]].runtime
        self._losses = Losses(
            scenario,
            agenda,
            self._clock,
            places=places,
            processes=processes,
            links=self._links,
            ledger=self._ledger,
            ring=self._excuses.ring,
            send_as_executor=partial(home.send_from_thread if scenario.topology == "one" else home.send, "executor"),
            begin_ring=self._begin_ring,
            on_engine_exit=lambda: self._children.note_engine_exit() if self._children is not None else None,
        )
        self._device = self._losses.device = Device(
            scenario,
            agenda,
            self._clock,
            stream(scenario.seed, "device"),
            self._make_model,
            is_thread=not self._has_engine_process,
            send=self._losses.send_from_executor,
            lose_sent=self._losses.lose_sent_by_executor,
            on_exit=lambda number, why: (
                self._children.note_executor_exit(number, why) if self._children is not None else None
            ),
        )
        self._injection = Injection(
            scenario,
            agenda,
            self._clock,
            links=self._links,
            processes=processes,
            send_as_front_end=partial(processes[places["frontend"]].runtime.send, "frontend"),
            losses=self._losses,
            device=self._device,
            supervisor=self._supervisor,
            is_over=self._is_over,
        )
        handlers: dict[Address, Callable[[Message, int], Iterable[Message]]] = {
            "frontend": self._front_end.handle,
            "tokenizer": self._edge.handle_tokenizer,
            "scheduler": self._losses.handle_scheduler,
            "kv_allocator": self._losses.handle_allocator,
            "detokenizer": self._edge.handle_detokenizer,
            "supervisor": self._handle_supervisor,
        }
        for address, handler in handlers.items():
            after = PlanDue() if address == "scheduler" else None
            processes[places[address]].add(address, self._watch(address, handler), after)
        self._link(handlers)
        if self._has_engine_process:
            self._children = self._make_children()

    def _make_children(self) -> Children:
        """Engine and executor as processes that the supervisor keeps alive."""
        scenario, places = self.scenario, self._places
        mailbox = self._processes[places["supervisor"]].mailboxes["supervisor"]
        link = self._links[places["scheduler"], places["supervisor"]]
        delays = stream(scenario.seed, "beats")
        beats = Link(self._agenda, delays, max_delay_ns=scenario.link_ns, duplicate_rate=0.0, encodes=scenario.encodes)
        return Children(
            scenario,
            self._agenda,
            self._clock,
            stream(scenario.seed, "notice"),
            supervisor=self._supervisor,
            device=self._device,
            lines=Lines(mailbox.post, beats, partial(link.send, "supervisor", mailbox.post)),
            engine=self._losses,
            is_over=self._is_over,
        )

    def _is_over(self) -> bool:
        """Whether nothing is left that the supervisor could have a part in."""
        now_ns = self._agenda.now_ns
        if self._is_broken or now_ns > self._all_begun_ns + LIVENESS_NS:
            return True
        if self._front_end.num_live or now_ns <= self._all_begun_ns or self._losses.engine_is_down:
            return False
        is_settled = self._supervisor.is_ready or self._supervisor.has_given_up
        return is_settled and not self._losses.is_engine_waiting

    def _link(self, addresses: Iterable[Address]) -> None:
        """Let every process reach every actor, by one link for each place."""
        scenario, places, processes = self.scenario, self._places, self._processes
        delays = stream(scenario.seed, "delays")
        posts: dict[Address, Callable[[Message], None]] = {
            address: processes[places[address]].mailboxes[address].post for address in addresses
        }
        posts["executor"] = self._device.post
        for name, process in processes.items():
            for address in ADDRESSES:
                place = places[address]
                if place != name or address == "executor":
                    link = self._links.get((name, place))
                    if link is None:
                        link = self._links[name, place] = Link(
                            self._agenda,
                            delays,
                            max_delay_ns=scenario.link_ns,
                            duplicate_rate=scenario.duplicate_rate,
                            encodes=scenario.encodes and place != name,
                        )
                    post = posts[address]
                    if address == "detokenizer":  # from another process: the scheduler's
                        post = partial(self._edge.hear_engine, post)
                    process.link(address, link, post)
            process.runtime.connect()

    def _begin_ring(self, ring: RingWatch) -> None:
        self._excuses.ring = ring

    def _make_model(self, epoch: Epoch) -> ExecutorModel:
        config = self.scenario.scheduler
        return ExecutorModel(
            epoch,
            self._oracles,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_sequence_len=config.max_sequence_len,
        )

    # -- watching -----------------------------------------------------------------------------------------------------

    def _watch(
        self, address: Address, handler: Callable[[Message, int], Iterable[Message]]
    ) -> Callable[[Message, int], Iterable[Message]]:
        note, injection = self._hash.noter(ADDRESSES.index(address), self._agenda), self._injection
        if not self._records:

            def handle(message: Message, now_ns: int) -> Iterable[Message]:
                note(message)
                if injection.defective is not None:
                    injection.meet_defect(address)
                return handler(message, now_ns)

            return handle
        recorded, agenda = self._recorded, self._agenda

        def record(message: Message, now_ns: int) -> Iterable[Message]:
            note(message)
            recorded.append((agenda.now_ns, address, message))
            if injection.defective is not None:
                injection.meet_defect(address)
            return handler(message, now_ns)

        return record

    def _handle_supervisor(self, message: Message, now_ns: int) -> Iterable[Message]:
        children = self._children
        if children is not None and isinstance(message, Beat | EngineReport):
            children.note(message, now_ns)
        if isinstance(message, EngineReport):
            return ()
        answers: list[Message] = self._supervisor.handle(message, now_ns)
        tell = self._processes[self._places["supervisor"]].runtime.send
        if any(isinstance(answer, EngineLost) for answer in answers):
            self._losses.put_in_place()
        for answer in answers:
            if isinstance(answer, StartExecutor | ExecutorLost):
                tell("supervisor", answer)
                if isinstance(answer, ExecutorLost) and self.scenario.duplicate_rate:
                    # It may not know what the scheduler has heard.
                    self._agenda.add(self._agenda.now_ns + REPEAT_NS, 0, partial(tell, "supervisor", answer))
            elif isinstance(answer, EngineLost):
                self._losses.take_up_again(answer)
            elif isinstance(answer, StartProcess) and children is not None:
                children.start_process(answer)
            elif isinstance(answer, KillProcess) and children is not None:
                children.kill_process(answer)
        if children is not None:
            children.arm_waker()
        return ()

    def _break(self, why: str) -> None:
        """What the engine does when it cannot go on."""
        self._is_broken = True
        self._front_end.end_all(why)

    def _on_failure(self, address: Address, error: Exception) -> None:
        if isinstance(error, InjectedError):
            self._is_defect_told = True
            if self._has_engine_process and address in {"scheduler", "kv_allocator"}:
                self._losses.lose_engine()  # its process ends
            else:
                self._break(str(error))
        else:
            self._violation = self._violation or as_violation(address, error)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Run to the end, or to the first violation."""
        agenda = self._agenda
        num_events = 0
        waits: tuple[str, ...] = ()
        try:
            self._begin()
            run_next = agenda.run_next
            while self._violation is None and run_next():
                num_events += 1
                if num_events > MAX_EVENTS or agenda.now_ns > MAX_NS:
                    waits = describe_waits(self._front_end, self._losses.ring, self._device, self._processes)
                    raise Violation("there is no end in sight", f"{num_events} events, {agenda.now_ns} ns")
                if self._is_broken:
                    break
            if self._violation is None:
                waits = describe_waits(self._front_end, self._losses.ring, self._device, self._processes)
                self._check_end()
                waits = ()
        except Violation as violation:
            self._violation = violation
        except Exception as error:
            if "RealWorldError" in type(error).__name__:
                raise
            self._violation = as_violation("simulation", error)
            self._violation.detail += "\n" + traceback.format_exc(limit=-4)
        found = self._violation
        return RunResult(
            self._hash.hexdigest(),
            num_events,
            found.kind if found else "",
            found.detail if found else "",
            tuple(describe_event(*event) for event in self._recorded),
            waits if found else (),
        )

    def _begin(self) -> None:
        agenda, scenario = self._agenda, self.scenario
        if self._children is not None:
            self._children.start()
        else:  # the first start is the runtime's, not the supervisor's
            self._device.post(StartExecutor(Epoch(0)))
        for number, client in enumerate(scenario.clients):
            agenda.add(client.at_ns, 0, partial(self._front_end.submit, number, client))
        self._injection.begin()
        agenda.add(TICK_NS, 0, self._tick)

    def _tick(self) -> None:
        stands_still = self._losses.engine_is_down or any(
            process.loop.stalled_until_ns > self._agenda.now_ns for process in self._processes.values()
        )
        if self._front_end.num_live_with_deadline and not stands_still:
            self._front_end.check_deadlines()
            self._processes[self._places["scheduler"]].mailboxes["scheduler"].wake()
        if self._front_end.num_live_with_deadline or self._agenda.now_ns < HEALED_NS:
            self._agenda.add(self._agenda.now_ns + TICK_NS, 0, self._tick)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _check_end(self) -> None:
        """Nothing happens any more: everything has ended, and nothing is held."""
        if self._injection.has_defect and not self._is_defect_told:
            raise Violation("an actor's exception is not told to anybody")
        for client_stream in self._front_end.streams.values():
            if client_stream.is_live:
                raise Violation("a request never ends", f"request {client_stream.request_id}")
        num_losses = self._losses.ring.num_losses
        if num_losses > self._device.num_deaths:
            raise Violation("an executor was replaced that nothing had happened to", f"{num_losses} losses")
        if self._is_broken:
            if not self._is_defect_told and self._excuses.num_poisons == 1 and not self._excuses.loses_executors:
                raise Violation("the request that kills executors was not found", f"{num_losses} losses")
            return
        self._losses.ring.check_end()
        check_nothing_left(
            {
                "rows on the executor": len(self._device.model.rows),
                "recipes in the ledger": self._ledger.num_live,
                "streams of the detokenizer": self._edge.detokenizer.num_streams,
            }
        )


def run_scenario(scenario: Scenario, max_recorded: int = 0) -> RunResult:
    """Run a scenario once."""
    return World(scenario, max_recorded).run()


__all__ = ["RunResult", "World", "run_scenario"]
