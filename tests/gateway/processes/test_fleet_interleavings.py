"""Real schedulers and allocators behind an edge's fleet, lost in any order while requests go from one to another.

The clients, their oracle and the executors are the fault simulator's, which knows of one engine; links and fleet are
those of production.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from octavo.actors.engine.report import Reporter
from octavo.actors.kv_allocator.core import AllocatorConfig, KVAllocatorCore
from octavo.actors.scheduler.core import SchedulerCore
from octavo.gateway.processes.engine_link import EngineLink, FromEngine
from octavo.gateway.processes.fleet import Fleet
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId
from octavo.messages.kv import BlocksFreed, PrefixMatched
from octavo.messages.request import CancelRequest, PromptReady, RequestEnded, StopMatched, SubmitRequest
from octavo.messages.step import ExecuteStep, PlanDue, StepExecuted
from octavo.messages.system import ExecutorLost
from octavo.sim.agenda import Agenda
from octavo.sim.faults.clients import FrontEndModel, Stream
from octavo.sim.faults.edge_side import EdgeSide
from octavo.sim.faults.executor_model import ExecutorModel
from octavo.sim.faults.network import VirtualClock
from octavo.sim.faults.oracle import Oracle
from octavo.sim.faults.scenario import Client, Scenario, draw_scenario

NUM_ACTIONS = 500
NUM_LAPS = 400
"""In which everything that is open ends, once nothing is lost any more."""


class Replica:
    """An engine with its executor, and what is under way between it and the edge."""

    def __init__(self, name: str, scenario: Scenario, oracles: dict[RequestId, Oracle]) -> None:
        self.name = name
        self.incarnation = 1
        self.epoch = Epoch(0)
        self.to_engine: deque[Message] = deque()
        self.to_edge: deque[Any] = deque()
        self.is_alive = True
        self.is_doomed = False  # its edge has asked for its end
        self.executor: ExecutorModel | None = None
        self._config = scenario.scheduler
        self._oracles = oracles
        self._now_ns = 0
        self.begin()

    def begin(self) -> None:
        """A new engine stands here, whose executor is ready."""
        config = self._config
        self.scheduler = SchedulerCore(config, self.epoch)
        self.allocator = KVAllocatorCore(
            AllocatorConfig(
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            self.epoch,
        )
        self.reporter = Reporter(self.incarnation)
        self.steps: deque[ExecuteStep] = deque()
        self.start_executor()

    def start_executor(self) -> None:
        config = self._config
        self.executor = ExecutorModel(
            self.epoch,
            self._oracles,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_sequence_len=config.max_sequence_len,
        )

    def hear(self, message: Message) -> None:
        """The scheduler takes a message, and plans."""
        self._now_ns += 1
        inbox: deque[Any] = deque([message, PlanDue()])
        while inbox:
            for answer in self.scheduler.handle(inbox.popleft(), self._now_ns):
                if isinstance(answer, StepExecuted | RequestEnded):
                    self.to_edge.append(answer)
                    continue
                for stamped in self.allocator.handle(answer, self._now_ns):  # type: ignore[arg-type]  # no executor fails
                    if isinstance(stamped, PrefixMatched | BlocksFreed):
                        inbox.extend((stamped, PlanDue()))
                    else:
                        self.steps.append(stamped)
        self.scheduler.check()

    def execute(self) -> None:
        """The executor takes a step, if it is there and has one."""
        while self.executor is not None and self.steps:
            step = self.steps.popleft()
            if step.epoch == self.executor.epoch:
                self.hear(self.executor.execute(step))
                return

    def report(self) -> None:
        self._now_ns += 1
        report = self.reporter.report(
            self.scheduler, self.allocator, num_edges_shed=0, messages_dropped=(), now_ns=self._now_ns
        )
        self.to_edge.append(report)


class Edge:
    """An edge with real links and a real fleet; and everything that may happen to its replicas."""

    def __init__(self, seed: int, num_replicas: int) -> None:
        self.random = random.Random(seed)
        self.port = self
        self.scenario = scenario = draw_scenario(seed)
        self.clients = deque(enumerate(map(patient, scenario.clients)))
        self.said: deque[Message] = deque()  # by the front end
        agenda = Agenda()
        clock = VirtualClock(agenda)
        self.side = EdgeSide(
            scenario,
            clock,
            client_of=lambda request_id: self.front_end.streams[request_id].client,
            has_ledger=False,  # each link has its own
        )
        self.front_end = FrontEndModel(
            agenda,
            clock,
            oracles=self.side.oracles,
            vocabulary=self.side.vocabulary,
            send=self.said.append,
            may_end_so=self._may_end_so,
            max_prompt=scenario.scheduler.max_sequence_len - 1,
        )
        self.replicas = [Replica(f"engine {index}", scenario, self.side.oracles) for index in range(num_replicas)]
        self.reliefs: list[Callable[[], None]] = []
        carrier: Any = self  # has what is used of it
        self.links = [
            EngineLink(
                *(replica.name, carrier, "/run"),
                deliver=self._deliver,
                on_stuck=partial(setattr, replica, "is_doomed", True),
            )
            for replica in self.replicas
        ]
        self.fleet = Fleet(self.links, "round_robin", call_later=self._call_later)
        for link in self.links:
            link.connect(1)
            link.is_up = True

    # ---- what links and fleet use ----

    def connect(self, peer: str, incarnation: int, endpoint: str) -> None:
        """What is under way to or from an incarnation before this counts no more."""
        replica = self._replica(peer)
        replica.to_engine.clear()
        replica.to_edge.clear()

    def send(self, peer: str, message: Message) -> bool:
        self._replica(peer).to_engine.append(message)
        return True

    def _replica(self, peer: str) -> Replica:
        return self.replicas[int(peer.rpartition(" ")[2])]

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> Any:
        reliefs = self.reliefs
        reliefs.append(callback)

        class Timer:
            def cancel(self) -> None:
                if callback in reliefs:
                    reliefs.remove(callback)

        return Timer()

    # ---- the actors at the edge ----

    def tokenize(self) -> None:
        """The tokenizer takes what the front end has said."""
        if self.said:
            for answer in self.side.handle_tokenizer(self.said.popleft(), 0):
                if isinstance(answer, PromptReady | RequestEnded):
                    self._hear(answer)
                else:
                    self.fleet.post(answer)

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, RequestEnded):
            self.fleet.note_end(message)
        self._hear(message)

    def _hear(self, message: Message) -> None:
        """The detokenizer hears something, and after it the front end, which compares it with what should come."""
        for answer in self.side.handle_detokenizer(message, 0):
            if isinstance(answer, StopMatched):
                self.fleet.post(answer)
            else:
                self.front_end.handle(answer, 0)

    def _may_end_so(self, stream: Stream, ended: RequestEnded, now_ns: int) -> bool:
        """A guess at whom executors died of may be wrong; a queue may be full; a prompt may be too long."""
        return ended.error_code in ("request_quarantined", "queue_full", "context_length_exceeded") or bool(
            ended.error_param
        )

    # ---- what happens ----

    def submit(self) -> None:
        if self.clients:
            self.front_end.submit(*self.clients.popleft())

    def cancel(self) -> None:
        live = [request_id for request_id, stream in self.front_end.streams.items() if stream.is_live]
        if live:
            self.front_end.cancel(self.random.choice(live))

    def carry_there(self, index: int) -> None:
        replica = self.replicas[index]
        if replica.is_alive and replica.to_engine:
            message = replica.to_engine.popleft()
            if isinstance(message, SubmitRequest | CancelRequest | StopMatched | ExecutorLost):
                replica.hear(message)

    def carry_back(self, index: int) -> None:
        if self.replicas[index].to_edge:
            self.links[index].take(self.replicas[index].to_edge.popleft())

    def execute(self, index: int) -> None:
        if self.replicas[index].is_alive:
            self.replicas[index].execute()

    def report(self, index: int) -> None:
        if self.replicas[index].is_alive:
            self.replicas[index].report()

    def lose_executor(self, index: int) -> None:
        replica = self.replicas[index]
        if replica.is_alive and replica.executor is not None and not self.links[index].is_gone:
            replica.executor = None
            replica.epoch = Epoch(replica.epoch + 1)
            self.links[index].send(ExecutorLost(replica.epoch, "died", is_innocent=self.random.random() < 0.5))
            self.fleet.set_up(index, is_up=False)

    def lose_engine(self, index: int) -> None:
        replica, link = self.replicas[index], self.links[index]
        replica.is_doomed = False
        if not replica.is_alive or link.is_gone:
            return
        replica.is_alive = False
        while replica.to_edge and self.random.random() < 0.8:  # its last words, not all of which arrive
            link.take(replica.to_edge.popleft())
        replica.incarnation += 1
        replica.epoch = Epoch(replica.epoch + 1)
        link.connect(replica.incarnation)
        self.fleet.set_up(index, is_up=False)

    def mend(self, index: int) -> None:
        """What a replica has lost is back."""
        replica, link = self.replicas[index], self.links[index]
        if link.is_gone:
            return
        if not replica.is_alive:
            replica.is_alive = True
            replica.begin()
            link.is_up = True
            link.resubmit(replica.epoch, "died")
        elif replica.executor is None:
            replica.start_executor()
        self.fleet.set_up(index, is_up=True)

    def relieve(self) -> None:
        """Half a second passes."""
        due = self.reliefs[:]
        self.reliefs.clear()
        for relief in due:
            relief()

    def abandon(self, index: int) -> None:
        if sum(not link.is_gone for link in self.links) > 1:
            assert self.fleet.abandon(index)

    # ---- until the end ----

    def run(self) -> None:
        often = (self.carry_there, self.carry_back, self.execute, self.report)
        seldom = (self.lose_executor, self.lose_executor, self.lose_engine, self.mend, self.mend, self.mend)
        for _ in range(NUM_ACTIONS):
            index = self.random.randrange(len(self.replicas))
            chance = self.random.random()
            if chance < 0.04:
                self.submit()
            elif chance < 0.05:
                self.cancel()
            elif chance < 0.15:
                self.tokenize()
            elif chance < 0.85:
                self.random.choice(often)(index)
            elif chance < 0.95:
                self.random.choice(seldom)(index)
            elif chance < 0.997:
                self.relieve()
            else:
                self.abandon(index)
            self._end_doomed()
        for _ in range(NUM_LAPS):
            self.submit()
            while self.said:
                self.tokenize()
            for index, replica in enumerate(self.replicas):
                self.mend(index)
                self.execute(index)
                self.report(index)
                while replica.is_alive and replica.to_engine:
                    self.carry_there(index)
                while replica.to_edge:
                    self.carry_back(index)
            self._end_doomed()
        self._check_end()

    def _end_doomed(self) -> None:
        for index, replica in enumerate(self.replicas):
            if replica.is_doomed:
                self.lose_engine(index)

    def _check_end(self) -> None:
        assert self.front_end.num_live == 0, "a request never ends"
        assert self.side.detokenizer.num_streams == 0
        assert self.fleet._router.num_open == 0
        for replica, link in zip(self.replicas, self.links, strict=True):
            link.ledger.check()
            assert link.ledger.num_live == 0
            if not link.is_gone:
                assert replica.scheduler.num_requests == replica.allocator.stats().num_held == len(link._moved) == 0


def patient(client: Client) -> Client:
    """The same client, who does without what time decides, and kills nobody."""
    return replace(client, timeout_ns=0, cancel_after_ns=-1, read_every_ns=0, is_poison=False)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_whatever_is_lost_while_requests_move_each_ends_once_with_its_own_tokens(num_replicas: int) -> None:
    for seed in range(50):
        try:
            Edge(seed, num_replicas).run()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
