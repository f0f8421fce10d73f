"""Scheduler and KV allocator in a process of their own."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

from ...messages.base import Message
from ...messages.errors import OctavoError
from ...messages.ids import Epoch, RequestId
from ...messages.kv import ResetPrefixCache
from ...messages.nodes import Listening
from ...messages.processes import (
    EdgeShed,
    EngineReport,
    PeerLeft,
    PeerStarted,
    RememberQuarantined,
    SetUpEngine,
    ShedHeard,
)
from ...messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from ...messages.step import PlanDue, StepExecuted
from ...messages.system import Beat, Drain, EngineReady, ExecutorLost
from ..journal.actor import Journal
from ..journal.config import JournalHeader
from ..kv_allocator.core import AllocatorConfig, KVAllocatorCore
from ..runtime.addresses import EDGE, TcpSettings, endpoint_of
from ..runtime.asyncio_port import AsyncioPort
from ..runtime.clock import MonotonicClock
from ..runtime.in_process import InProcessRuntime
from ..runtime.logs import configure_logs
from ..runtime.port import LinkEvent, Port
from ..runtime.port_limits import EDGE_LIMITS
from ..runtime.port_record import drops_of
from ..runtime.routes import ROUTES, Address
from ..scheduler.config import SchedulerConfig
from ..scheduler.core import Quarantine, SchedulerCore
from .audit import Audit
from .peers import Edges, Executors, Peers, edge_of, incarnation_of, is_of
from .report import Reporter
from .shed_edges import ShedEdges
from .suspects import find_suspects, last_words
from .trial import Trial

log = structlog.get_logger("octavo.engine")

BEAT_S = 0.25

_FLUSH_NS = 250_000_000
"""How long it waits for its last word to leave."""

_MAX_BEATS_WAITING = 1024
"""An edge 0 that takes nothing for minutes needs no more of them when it goes on."""

_FROM_EDGES = (SubmitRequest, CancelRequest, StopMatched, ResetPrefixCache, RememberQuarantined, ShedHeard)
_FROM_SUPERVISOR = (*_FROM_EDGES, Drain, ExecutorLost, SetUpEngine, PeerStarted, PeerLeft)


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to schedule with.

    Attributes:
        scheduler, allocator: of the cores.
        mailbox_capacity: messages that may wait for each.
        octavo, model: for the journal's header.
        journal: file to record in, or None; each incarnation has one of its own.
        journal_prompts: record token ids as they are.
    """

    scheduler: SchedulerConfig
    allocator: AllocatorConfig
    mailbox_capacity: int
    octavo: str
    model: str
    journal: str | None = None
    journal_prompts: bool = False


class EngineProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process is told at its start.

    Attributes:
        name, incarnation: who it is.
        epoch: of the steps to come.
        run_dir: of the sockets.
        edges, executors: names and incarnations.
        setup: None if it is not known yet: `SetUpEngine` brings it.
        log_format: as `configure_logs` takes it.
        tcp: how it listens to other hosts, beside its own; None: not at all.
        elsewhere: executors on other hosts.
    """

    name: str
    incarnation: int
    epoch: Epoch
    run_dir: str
    edges: tuple[tuple[str, int], ...]
    executors: tuple[tuple[str, int], ...]
    setup: EngineSetup | None = None
    log_format: str = "auto"
    tcp: TcpSettings | None = None
    elsewhere: tuple[PeerStarted, ...] = ()


def run(arguments: bytes) -> int:
    """Be the engine until killed; `arguments` is an `EngineProcessSpec` in msgpack."""
    spec = msgspec.msgpack.decode(arguments, type=EngineProcessSpec)
    configure_logs(spec.log_format)
    # A terminal's Ctrl-C is for the edge, which lets open streams end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return asyncio.run(_serve(spec))


async def _serve(spec: EngineProcessSpec) -> int:
    engine = EngineProcess(spec)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: engine.fail_in_callback(context))
    # Only the journal cares for a polite end.
    loop.add_signal_handler(signal.SIGTERM, engine.end)
    gc.freeze()
    try:
        return await engine.ended
    finally:
        await engine.close()


class EngineProcess:
    """Scheduler, KV allocator and a port, on the running loop.

    Attributes:
        ended: exit code, once there is nothing more to do.
    """

    def __init__(self, spec: EngineProcessSpec) -> None:
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = loop.create_future()
        self._spec = spec
        self._clock = MonotonicClock()
        self._journal: Journal | None = None
        self._scheduler: SchedulerCore | None = None
        self._quarantine = Quarantine()
        self._num_messages = 0
        self._handling: Message | None = None  # what scheduler or KV allocator were given last
        self._taking: Message | None = None
        self._trial = Trial()
        self._last_words: list[str] = []  # edges that were told why it ends
        self._reporter = Reporter(spec.incarnation)
        allowed = {"edge": _FROM_EDGES, EDGE: _FROM_SUPERVISOR, "executor": (StepExecuted,)}
        keys = spec.tcp.read_keys() if spec.tcp is not None else None
        self._port = Port(
            spec.name,
            spec.incarnation,
            keys=keys,
            allowed=allowed,
            allow_plain_loopback=keys is None,
            limits_of={"edge": EDGE_LIMITS},
        )
        self._port.bind(endpoint_of(spec.run_dir, spec.name, spec.incarnation))
        endpoint = self._port.bind(spec.tcp.endpoint) if spec.tcp is not None else ""
        self._peers: dict[str, int] = {}
        for name, incarnation in (*spec.edges, *spec.executors):
            self._connect(name, incarnation)
        self._left: dict[tuple[str, int], None] = {}  # edges of which requests may still be live
        self._shed = ShedEdges()
        self._edges = Edges([name for name, _ in spec.edges], self.send, self._shed)
        self._executors = Executors([name for name, _ in spec.executors], self.send)
        for peer in spec.elsewhere:
            self._start_peer(peer)
        self._carrier = AsyncioPort(loop, self._port, self._take, self._on_link, on_failure=self._on_port_failure)
        if endpoint:
            self.send(EDGE, Listening(spec.name, spec.incarnation, endpoint))
        if spec.setup is not None:
            self._set_up(spec.setup)
        self._ticker = loop.call_soon(self._tick)

    async def close(self) -> None:
        self._ticker.cancel()
        self._carrier.close()
        for edge in self._last_words:
            self._flush(edge)
        if self._journal is not None:
            await self._journal.close()
        self._port.close()

    def _flush(self, edge: str) -> None:
        """Give the last word a moment to leave."""
        deadline_ns = self._clock.now_ns() + _FLUSH_NS
        while self._port.num_queued(edge) and self._clock.now_ns() < deadline_ns:
            self._port.wait(20)
            self._port.receive()

    def end(self) -> None:
        """Take no more."""
        if not self.ended.done():
            self.ended.set_result(0)

    def fail(self) -> None:
        """Something was lost: the next engine is given everything again."""
        if not self.ended.done():
            self.ended.set_result(1)

    def fail_in_callback(self, context: dict[str, Any]) -> None:
        """An exception left a callback of the loop; `context` is as the loop describes it."""
        log.error("engine.failed", why=context["message"], exc_info=context.get("exception"))
        self.fail()

    def send(self, peer: str, message: Message) -> None:
        """Send; an edge that does not take it is shed.

        With a message to an executor lost, only a new engine knows that everybody has the same picture: it gives up.
        """
        if self.ended.done():
            return  # what came behind the lost one would look as if nothing were missing
        if self._carrier.send(peer, message):
            return
        if peer in self._edges.names:
            self._shed_edge(peer)
            if not isinstance(message, StepExecuted | RequestEnded | EngineReport):
                self._carrier.send(peer, message)  # what it needs to know in any case
            return
        log.error("engine.cannot_send", peer=peer, message=type(message).__name__)
        self.fail()

    def _connect(self, name: str, incarnation: int, endpoint: str = "", server_key: str = "") -> None:
        self._peers[name] = incarnation
        endpoint = endpoint or endpoint_of(self._spec.run_dir, name, incarnation)
        self._port.connect(name, incarnation, endpoint, server_key=server_key.encode())

    def _set_up(self, setup: EngineSetup) -> None:
        self._scheduler = scheduler = SchedulerCore(setup.scheduler, self._spec.epoch, quarantine=self._quarantine)
        self._allocator = allocator = KVAllocatorCore(setup.allocator, self._spec.epoch)
        self._audit = Audit((scheduler, allocator), self._clock)
        handle_scheduler, handle_allocator = self._recorded(setup, scheduler.handle, allocator.handle)
        handle_scheduler, handle_allocator = self._noting(handle_scheduler), self._noting(handle_allocator)
        local = {"scheduler", "kv_allocator"}
        routes = {route: receivers for route, receivers in ROUTES.items() if route[0] in local}
        self._runtime = runtime = InProcessRuntime(routes, self._clock, self._on_actor_failure)
        self._scheduler_mailbox = runtime.add_actor(
            "scheduler", handle_scheduler, setup.mailbox_capacity, after_batch=PlanDue()
        )
        self._allocator_mailbox = runtime.add_actor("kv_allocator", handle_allocator, setup.mailbox_capacity)
        runtime.add("executor", self._executors)
        runtime.add("detokenizer", self._edges)
        runtime.add("supervisor", Peers([EDGE], self.send))
        runtime.connect()
        self.send(EDGE, EngineReady(self._spec.incarnation))

    def _recorded(
        self,
        setup: EngineSetup,
        handle_scheduler: Callable[[Any, int], Any],
        handle_allocator: Callable[[Any, int], Any],
    ) -> tuple[Callable[[Any, int], Any], Callable[[Any, int], Any]]:
        """The same, with a journal around them if one is asked for and can be made: without one it serves as well."""
        if setup.journal is None:
            return handle_scheduler, handle_allocator
        header = JournalHeader(
            octavo=setup.octavo,
            model=setup.model,
            started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            start_ns=self._clock.now_ns(),
            has_tokens=setup.journal_prompts,
            scheduler=setup.scheduler,
            allocator=setup.allocator,
            scheduler_epoch=self._spec.epoch,
            allocator_epoch=self._spec.epoch,
        )
        try:
            self._journal = journal = Journal(setup.journal, header)
        except (OctavoError, OSError) as error:  # the folder was there when the server was started
            log.error("journal.not_made", path=setup.journal, why=str(error))
            return handle_scheduler, handle_allocator
        return journal.wrap_scheduler(handle_scheduler), journal.wrap_allocator(handle_allocator)

    def _noting(self, handle: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        """The same, but that it is known which message it raised at, and a trial learns from the answers."""

        def note_and_handle(message: Message, now_ns: int) -> Any:
            self._handling = message
            answers = handle(message, now_ns)
            if self._trial.is_on:
                self._submit_all(self._trial.note(answers))
            return answers

        return note_and_handle

    def _submit_all(self, submits: list[SubmitRequest]) -> None:
        for submit in submits:
            self._scheduler_mailbox.post(submit)

    def _take(self, messages: list[tuple[str, Message]]) -> None:
        self._num_messages += len(messages)
        for peer, message in messages:
            self._taking = message
            if isinstance(message, SetUpEngine):
                if self._scheduler is None:
                    self._set_up(msgspec.msgpack.decode(message.setup, type=EngineSetup))
            elif isinstance(message, PeerStarted):
                self._start_peer(message)
            elif isinstance(message, PeerLeft):
                self._lose_edge(message)
            elif self._scheduler is None:
                continue  # nothing was asked of it yet
            elif isinstance(message, SubmitRequest) and not self._may_submit(message.request_id):
                continue  # the last words of an edge that has left
            elif isinstance(message, ShedHeard):
                self._shed.take_answer(peer, message.number)
            elif peer in self._shed and isinstance(message, SubmitRequest | CancelRequest | StopMatched):
                continue  # it will say so again
            elif isinstance(message, RememberQuarantined):
                self._quarantine.remember(message)
            elif isinstance(message, ResetPrefixCache):
                self._allocator_mailbox.post(message)
            elif isinstance(message, StepExecuted):
                if peer in self._executors.names:
                    self._executors.note_answer(message)
                    self._scheduler_mailbox.post(message)
            elif isinstance(message, SubmitRequest):
                self._submit_all(self._trial.submit(message))
            else:
                if self._trial.is_on and isinstance(message, CancelRequest | StopMatched):
                    self._submit_all(self._trial.release(message.request_id))
                self._scheduler_mailbox.post(message)
        self._taking = None

    def _start_peer(self, peer: PeerStarted) -> None:
        if peer.incarnation <= self._peers.get(peer.name, 0):
            return  # known already, and what is on its way to it must not be lost
        self._connect(peer.name, peer.incarnation, peer.endpoint, peer.server_key)
        group: Peers = self._edges
        if peer.name.startswith("executor"):
            group = self._executors
            self._executors.repeat_to(peer.name)
        self._shed.forget(peer.name)
        if peer.name not in group.names:
            group.names.append(peer.name)

    def _may_submit(self, request_id: RequestId) -> bool:
        """Whether the edge that gave an id still waits for it; a new edge may be quicker than edge 0's news of it."""
        edge, incarnation = edge_of(request_id), incarnation_of(request_id)
        if edge == EDGE:
            return True
        self._start_peer(PeerStarted(edge, incarnation))
        return edge in self._edges.names and self._peers[edge] == incarnation

    def _lose_edge(self, edge: PeerLeft) -> None:
        self._peers[edge.name] = max(edge.incarnation, self._peers.get(edge.name, 0))
        if self._peers.get(edge.name) == edge.incarnation:  # and not one that has taken its place
            self._port.disconnect(edge.name)
            if edge.name in self._edges.names:
                self._edges.names.remove(edge.name)
            self._shed.forget(edge.name)
        self._left[edge.name, edge.incarnation] = None
        self._forget_held(edge.name, edge.incarnation)
        asyncio.get_running_loop().call_soon(self._cancel_left)

    def _forget_held(self, edge: str, incarnation: int) -> None:
        """Nobody waits any more for what an edge asked for and the scheduler has not heard of."""
        if self._trial.is_on:
            self._submit_all(self._trial.drop(lambda request_id: is_of(request_id, edge, incarnation)))

    def _cancel_left(self) -> None:
        """Cancel what edges asked for that have left, and what of it still waited in the mailbox the last time."""
        if self._scheduler is None:
            return
        for name, incarnation in list(self._left):
            if not self._cancel_requests_of(name, incarnation) and not len(self._scheduler_mailbox):
                del self._left[name, incarnation]

    def _cancel_requests_of(self, edge: str, incarnation: int) -> bool:
        """Nobody waits any more for what an edge asked for; returns whether there was any of it."""
        assert self._scheduler is not None
        theirs = [
            request_id for request_id in self._scheduler.live_request_ids() if is_of(request_id, edge, incarnation)
        ]
        for request_id in theirs:
            self._scheduler_mailbox.post(CancelRequest(request_id))
        return bool(theirs)

    # ---- edges that take no more ----

    def _shed_edge(self, name: str) -> None:
        """Go on without an edge until it says again what it waits for."""
        self._shed.add(name)
        self._forget_held(name, self._peers[name])
        log.error("edge.shed", edge=name, num_untaken=self._port.num_queued(name), total=self._shed.num_shed)
        self._connect(name, self._peers[name])  # what it had not taken is dropped

    def _tell_shed_edges(self, scheduler: SchedulerCore) -> None:
        """Cancel what edges asked for before they were shed, and tell each once all traces of it are gone."""
        for name in self._shed.untold:
            if not self._cancel_requests_of(name, self._peers[name]) and not len(self._scheduler_mailbox):
                self._shed.note_ended(name, scheduler.stats().num_steps)
            stats = scheduler.stats()
            if not self._shed.is_due(name, stats.num_steps - stats.num_steps_in_flight):
                continue
            told = EdgeShed(self._spec.incarnation, self._shed.number_of(name))
            if self._carrier.send(name, told):
                self._shed.note_told(name)
            else:
                self._connect(name, self._peers[name])

    def _on_link(self, event: LinkEvent) -> None:
        if event.what in ("refused", "overrun", "malformed", "gap"):
            log.warning("link", peer=event.peer, what=event.what, why=event.why)
        if event.what == "refused":
            self._shed.note_told(event.peer, is_told=False)

    def _on_actor_failure(self, address: Address, error: Exception) -> None:
        log.error("actor.failed", actor=address, exc_info=error)
        self._say_last_words(self._handling, error)
        self.fail()

    def _on_port_failure(self, error: Exception) -> None:
        self._say_last_words(self._taking, error)
        self.fail()

    def _say_last_words(self, message: Message | None, error: Exception) -> None:
        """Tell the edges whose requests it may have failed at."""
        if self._scheduler is None or self.ended.done():
            return
        try:
            suspects = find_suspects(message, self._scheduler, self._trial)
        except Exception:  # whatever state the scheduler is in
            log.exception("engine.cannot_tell_why")
            return
        log.error(
            "engine.failed_at",
            message=type(message).__name__,
            request_id=suspects.named,
            num_suspects=len(suspects.among),
        )
        for edge, failed in last_words(suspects, self._spec.incarnation, error):
            self.send(edge, failed)
            self._last_words.append(edge)

    def _tick(self) -> None:
        now_ns = self._clock.now_ns()
        if EDGE not in self._shed or self._port.num_queued(EDGE) < _MAX_BEATS_WAITING:
            self._port.send(EDGE, Beat(self._spec.name, self._spec.incarnation, progress=self._num_messages))
        if self._scheduler is not None:
            if 0 < self._scheduler.next_deadline_ns <= now_ns:
                self._scheduler_mailbox.wake()
            if self._journal is not None:
                self._journal.flush_if_due(now_ns)
            self._cancel_left()
            self._tell_shed_edges(self._scheduler)
            report = self._reporter.report(
                self._scheduler,
                self._allocator,
                num_edges_shed=self._shed.num_shed,
                messages_dropped=drops_of(self._port.counters),
                now_ns=now_ns,
            )
            self._edges.post(report)
            if fault := self._audit.find_fault(is_idle=not (report.num_running or report.num_waiting)):
                log.error("engine.contradicts_itself", why=fault)
                self.fail()
        self._ticker = asyncio.get_running_loop().call_later(BEAT_S, self._tick)
