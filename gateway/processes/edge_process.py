"""A further edge, in a process of its own: HTTP, front end, tokenizer and detokenizer beside those of edge 0.

Edge 0 may die, and engines and executors with it. Then an edge with open streams takes its place as supervisor, starts
engines and executors anew, and the edges give them what they had. No new request is let in: the server ends with its
last stream.
"""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from ...actors.engine.peers import first_request_id
from ...actors.runtime.addresses import EDGE, endpoint_of, mark_of
from ...actors.runtime.asyncio_port import AsyncioPort
from ...actors.runtime.clock import MonotonicClock
from ...actors.runtime.logs import configure_logs
from ...actors.runtime.port import Port
from ...actors.runtime.process_mark import write_mark
from ...actors.runtime.run_dir import RunDir, RunDirHeir
from ...actors.runtime.succession import Succession
from ...actors.scheduler.quarantine import Quarantine
from ...messages.base import Message
from ...messages.errors import OctavoError
from ...messages.kv import ResetPrefixCache
from ...messages.processes import (
    AccountTold,
    EdgeShed,
    EdgeStatus,
    EngineFailed,
    EngineReport,
    EngineStuck,
    EngineUp,
    PeerStarted,
)
from ...messages.request import RequestEnded
from ...messages.step import StepExecuted
from ...messages.system import Beat, Drain
from ..api.server import serve_http
from ..engine import Engine
from ..engine_setup import load_tokenizer_of
from ..stats import EngineStats
from .edge_accounts import AccountLine
from .edge_graph import EdgeGraph
from .edge_port import FROM_ENGINE, fleet_stats, log_link_event
from .engine_link import EngineLink
from .other_edges import CUT_SIGNAL, EdgeProcessSpec
from .shed_edge import take_up_again
from .supervision import Footing, Supervision
from .supervisor_watch import SupervisorWatch

if TYPE_CHECKING:
    from ...actors.tokenizer.hf_tokenizer import HFTokenizer

BEAT_S = 0.25
BEATS_PER_ACCOUNT = 4

FROM_SUPERVISION = (EngineUp, EdgeStatus, PeerStarted, AccountTold)

MAX_TRIES = 250
FREE_S = 0.02
"""How often an address of a process that died is tried, and the pause between: by tries, as a host may stand still."""

MAX_RESTARTS = 1_000_000_000
"""More incarnations and epochs than one supervision uses."""

log = structlog.get_logger("octavo.edge")


def run(arguments: bytes) -> int:
    """Be an edge until told to end; `arguments` is an `EdgeProcessSpec` in msgpack."""
    spec = msgspec.msgpack.decode(arguments, type=EdgeProcessSpec)
    configure_logs(spec.log_format)
    # A terminal's Ctrl-C is for edge 0, which tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(spec))
    return 0


async def _serve(spec: EdgeProcessSpec) -> None:
    graph = FollowerGraph(spec, await asyncio.to_thread(load_tokenizer_of, spec.config, Path(spec.facts.folder)))
    stop, abort = asyncio.Event(), asyncio.Event()

    def cut() -> None:
        stop.set()
        abort.set()

    def end() -> None:
        if graph.is_orphaned:  # nobody else is left to say so, and it drains already
            abort.set()
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_signal_handler(CUT_SIGNAL, cut)
    graph.await_succession(stop.set)
    async with Engine.around(spec.config, graph) as engine:
        await serve_http(
            engine,
            spec.settings,
            spec.host,
            spec.port,
            stop=stop,
            abort=abort,
            handle_signals=False,
            is_port_shared=True,
        )
        await graph.wait_for_others()


class FollowerGraph(EdgeGraph):
    """The actors of an edge that is told which engines there are: by edge 0, or by the supervision that comes after it.

    Args:
        spec: as this process was started.
        tokenizer: of the model.

    Attributes:
        is_orphaned: whether edge 0 is dead, and new requests are refused.

    Raises:
        RunDirError: edge 0 is dead already.
    """

    def __init__(self, spec: EdgeProcessSpec, tokenizer: HFTokenizer) -> None:
        loop = asyncio.get_running_loop()
        self._spec = spec
        self._heir = RunDirHeir(Path(spec.run_dir))
        self._succession = Succession(Path(spec.run_dir))
        self.is_orphaned = False
        self._supervisor_incarnation = spec.edge_incarnation
        self._clock = MonotonicClock()
        self._on_orphaned: Callable[[], None] = lambda: None
        self._run_dir: RunDir | None = None
        self._supervision: Supervision | None = None
        self._taking_over: asyncio.Task[None] | None = None
        self._status = EdgeStatus("")
        self._progress = 0
        self._num_steps = 0  # that this process heard of, of any engine
        self._watch = SupervisorWatch()
        # Before the socket: whoever finds that finds this, too.
        self._mark = mark_of(spec.run_dir, spec.name, spec.incarnation)
        write_mark(self._mark)
        port = Port(spec.name, spec.incarnation, allowed={"engine": FROM_ENGINE, EDGE: FROM_SUPERVISION})
        port.bind(endpoint_of(spec.run_dir, spec.name, spec.incarnation))
        port.connect(EDGE, spec.edge_incarnation, endpoint_of(spec.run_dir, EDGE, spec.edge_incarnation))
        self._carrier = AsyncioPort(loop, port, self._take, log_link_event, on_failure=self._fail)
        quarantine = Quarantine()
        self._links = {
            name: EngineLink(
                name,
                self._carrier,
                spec.run_dir,
                deliver=self._deliver,
                on_stuck=partial(self._report_stuck, name),
                quarantine=quarantine,
            )
            for name in spec.engine_names
        }
        super().__init__(spec.config, port, list(self._links.values()))
        self._num_beats = 0
        self._account = AccountLine(
            spec.name, spec.incarnation, lambda message: self._carrier.send(EDGE, message), self._own_stats
        )
        self._add_actors(spec.facts, tokenizer, first_request_id=first_request_id(spec.name, spec.incarnation))
        for engine in spec.engines:
            self._meet(engine, is_first=True)
        self._beat()

    @property
    def why_not_ready(self) -> str:
        return self._broken_because or self._status.why_not_ready

    @property
    def restarts(self) -> dict[str, int]:
        return dict(self._status.restarts)

    @property
    def service_account(self) -> AccountLine:
        return self._account

    def send(self, message: Drain | ResetPrefixCache) -> None:
        if isinstance(message, ResetPrefixCache):  # draining is this edge's own matter: the engine serves others, too
            super().send(message)

    async def close(self) -> None:
        self._beats.cancel()
        self._fleet.close()
        await self._actors.close()
        if self._taking_over is not None:
            self._taking_over.cancel()
            await asyncio.gather(self._taking_over, return_exceptions=True)
        if self._supervision is not None:
            await self._supervision.close()
        self._carrier.close()
        self._port.close()
        self._mark.unlink(missing_ok=True)
        if self._run_dir is not None:
            self._run_dir.remove()

    # ---- after edge 0 ----

    def await_succession(self, on_orphaned: Callable[[], None]) -> None:
        """Take edge 0's place when it dies, if it is this process's turn.

        Args:
            on_orphaned: called when edge 0 is dead; the server should end with its streams.
        """
        self._on_orphaned = on_orphaned
        self._succession.await_turn(asyncio.get_running_loop(), self._succeed)

    async def wait_for_others(self) -> None:
        """If this process supervises the others: until they, too, have finished."""
        if self._supervision is not None and self._supervision.others is not None:
            await self._supervision.others.wait_for_leave(but=self._spec.name)

    def _succeed(self) -> None:
        """Edge 0, and whoever came after it, is dead."""
        self._orphan()
        if self.frontend.num_live:
            self._taking_over = asyncio.get_running_loop().create_task(self._take_over())
        # Otherwise this process ends now, and the next one has its turn.

    def _orphan(self) -> None:
        self.is_orphaned = True
        self.frontend.close("it is shutting down")
        self._on_orphaned()
        for link in self._links.values():
            link.is_up = False  # what is said from now on is for the next engine

    async def _take_over(self) -> None:
        spec = self._spec
        # Not one more than was heard of: one that took over may have died before anybody heard of it.
        incarnation = spec.edge_incarnation + self._succession.generation
        log.error("supervision.taken_over", edge=spec.name, incarnation=incarnation, num_live=self.frontend.num_live)
        self._run_dir = self._heir.inherit()
        try:
            self._supervision = supervision = await self._make_supervision(incarnation)
            assert supervision.others is not None
            supervision.assume(spec.facts, self._actors.capacity)
            supervision.others.adopt()
            await supervision.start()
        except (OctavoError, OSError) as error:
            log.exception("supervision.failed")
            self._break(f"edge 0 died, and {spec.name} cannot stand in for it: {error}")

    async def _make_supervision(self, incarnation: int) -> Supervision:
        """Listen where edge 0 did.

        Raises:
            InvalidConfigError, OSError: it cannot.
        """
        spec = self._spec
        num_before = (incarnation - spec.edge_incarnation) * MAX_RESTARTS
        num_tries = 0
        while True:
            num_tries += 1
            try:
                return Supervision(
                    spec.config,
                    spec.facts.folder,
                    num_edges=2,
                    log_format=spec.log_format,
                    run_dir=spec.run_dir,
                    footing=Footing.of(spec.config, spec.nodes, incarnation=incarnation, num_before=num_before),
                    nodes=spec.nodes,
                    digest=spec.digest,
                    deliver=lambda _: None,  # no request of edge 0's is live
                    on_give_up=self._note_given_up,
                )
            except OSError as error:
                # Of what a dying process has open, the lock may be closed before the address that nodes join at.
                if error.errno != errno.EADDRINUSE or num_tries == MAX_TRIES:
                    raise
                await asyncio.sleep(FREE_S)

    def _note_given_up(self, index: int, why: str) -> None:
        assert self._supervision is not None
        self._supervision.replicas[index].link.give_up()  # every edge hears of it, and acts

    def _follow_supervision(self, incarnation: int) -> None:
        """Another edge has taken edge 0's place, or this one has."""
        if incarnation > self._supervisor_incarnation:
            self._supervisor_incarnation = incarnation
            self._port.connect(EDGE, incarnation, endpoint_of(self._spec.run_dir, EDGE, incarnation))
            self._orphan()

    # ---- carrying ----

    def _fail(self, error: Exception) -> None:
        """A message could not be taken, and what it was about is lost: end, so that another edge is started."""
        self._break(f"{self._spec.name} failed: {type(error).__name__}")
        self._on_orphaned()

    def _meet(self, engine: EngineUp, *, is_first: bool = False) -> None:
        link = self._links[engine.name]
        link.connect(engine.incarnation)
        link.is_up = True
        if not is_first:
            link.resubmit(engine.epoch, "edge 0 says so")

    def _take(self, messages: list[tuple[str, Message]]) -> None:
        self._progress += len(messages)
        for peer, message in messages:
            if isinstance(message, StepExecuted | RequestEnded | EngineReport):
                self._num_steps += not isinstance(message, EngineReport)
                self._links[peer].take(message)
            elif isinstance(message, EngineFailed):
                self._links[peer].take(message)
            elif isinstance(message, EdgeShed):
                take_up_again(self._links[peer], message)
            elif isinstance(message, EngineUp):
                self._meet(message)
            elif isinstance(message, EdgeStatus):
                self._follow(message)
            elif isinstance(message, AccountTold):
                self._account.take(message)
            elif isinstance(message, PeerStarted):
                self._follow_supervision(message.incarnation)

    def _follow(self, status: EdgeStatus) -> None:
        self._status = status
        for index, link in enumerate(self._fleet.links):
            if link.name not in status.engines_gone:
                self._fleet.set_up(index, is_up=link.name not in status.engines_down)
            elif not self._fleet.abandon(index):
                self._break(status.why_not_ready)

    def _report_stuck(self, engine: str) -> None:
        self._carrier.send(EDGE, EngineStuck(engine, self._links[engine].incarnation))

    def _beat(self) -> None:
        self._carrier.send(EDGE, Beat(self._spec.name, self._spec.incarnation, progress=self._progress))
        self._num_beats += 1
        if self._num_beats % BEATS_PER_ACCOUNT == 0:
            self._account.tell()
        for name, link in self._links.items():
            if link.is_stuck and not link.is_gone:  # edge 0 may not have heard of it, or may be another one since
                self._report_stuck(name)
        if self._supervision is None:
            self._watch_supervisor()
        self._beats = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _own_stats(self) -> EngineStats:
        late = sum(link.ledger.num_dropped_messages for link in self._links.values())
        return fleet_stats((), self._actors, self._port, {}, {"late": late})

    def _watch_supervisor(self) -> None:
        reports = [link.total("num_steps") for link in self._links.values()]
        if self._watch.look(
            self._clock.now_ns(),
            num_waiting=sum(link.ledger.num_live for link in self._links.values()),
            progress=self._num_steps + sum(reports),
            is_stopped=self._succession.is_holder_stopped,
        ):
            pid = self._succession.holder
            if self._succession.end_holder():
                log.error("supervision.fenced", pid=pid, why="it is stopped, and no engine gets on without it")
