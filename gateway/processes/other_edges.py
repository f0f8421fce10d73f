"""The further edges of `--gateways N`: processes with an HTTP server of their own on the same port.

They outlive edge 0: if it dies, they finish what their clients wait for (`edge_process`).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import structlog

from ...actors.runtime.addresses import EDGE, EDGE_INCARNATION, edges_listening, endpoint_of, remove_socket
from ...actors.runtime.clock import MonotonicClock
from ...actors.runtime.independent import IndependentProcesses
from ...actors.runtime.processes import ProcessSpec
from ...actors.supervisor.actor import Supervisor
from ...actors.supervisor.config import ChildConfig, SupervisorConfig
from ...messages.base import Message
from ...messages.processes import AccountAsked, EdgeAccount, EdgeStatus, EngineUp, PeerLeft, PeerStarted
from ...messages.system import Beat, StartProcess
from ..api.settings import ServerSettings
from ..config import EngineConfig, NodesConfig
from ..graph import ModelFacts
from .edge_accounts import AccountSum
from .edge_watch import EdgeWatch

if TYPE_CHECKING:
    from ...actors.runtime.asyncio_port import AsyncioPort

log = structlog.get_logger("octavo.edges")

EDGE_MODULE = "octavo.gateway.processes.edge_process"

CUT_SIGNAL = signal.SIGUSR1
"""Not a second SIGTERM: the system hands over two of a kind as one if they come close together."""

_MAX_START_SILENCE_NS = 120_000_000_000
"""An edge imports everything itself; nobody waits for it in the meantime."""

_MAX_SILENCE_NS = 10_000_000_000
"""More than an engine or an executor is given, who cost no stream when they are replaced: an edge takes its clients'
along. On a machine with ten times as much to do as it has cores, one that is well was silent for 1.6 s. An edge that is
stopped, the usual hang, is known by its state at once."""

_LOOK_S = 0.1
_MAX_LOOK_GAP_NS = 300_000_000
"""Between two looks; in a longer one who is stopped may have gone on, and have been stopped again."""


class EdgeProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a further edge is told at its start.

    Attributes:
        name, incarnation: who it is.
        run_dir: of the sockets.
        config, settings: as of edge 0.
        facts: of the model.
        engines: name, incarnation and epoch of each engine that is up.
        engine_names: of all.
        host, port: to listen on, beside the other edges.
        log_format: as `configure_logs` takes it.
        edge_incarnation: of edge 0.
        nodes, digest: other hosts that run executors, should this edge have to supervise them.
    """

    name: str
    incarnation: int
    run_dir: str
    config: EngineConfig
    settings: ServerSettings
    facts: ModelFacts
    engines: tuple[EngineUp, ...]
    engine_names: tuple[str, ...]
    host: str
    port: int
    log_format: str = "auto"
    edge_incarnation: int = EDGE_INCARNATION
    nodes: NodesConfig | None = None
    digest: str = ""


class OtherEdges:
    """Keeps the further edges alive, and tells them what edge 0 knows.

    In an edge that has taken edge 0's place it adopts those that run, itself among them, and starts none.

    Args:
        num_edges: all in all; edge 0 is none of the others.
        carrier: edge 0's port; what the others send is to be given to `take`.
        run_dir: of the sockets.
        engine_names: of all replicas.
        post_to_engines: says something to every engine.
        log_format: of the processes.
        edge_incarnation: of edge 0.
        nodes, digest: as of `EdgeProcessSpec`.
        on_change: called when one of them is started, for the first time or anew.

    Attributes:
        accounts: of what they count.
    """

    def __init__(
        self,
        num_edges: int,
        carrier: AsyncioPort,
        run_dir: str,
        *,
        engine_names: tuple[str, ...],
        post_to_engines: Callable[[Message], None],
        log_format: str,
        edge_incarnation: int = EDGE_INCARNATION,
        nodes: NodesConfig | None = None,
        digest: str = "",
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.accounts = AccountSum()
        self._on_change = on_change
        self.names = [f"edge {number}" for number in range(1, num_edges)]
        self._carrier = carrier
        self._run_dir = run_dir
        self._engine_names = engine_names
        self._post_to_engines = post_to_engines
        self._log_format = log_format
        self._edge_incarnation = edge_incarnation
        self._nodes = nodes
        self._digest = digest
        self._clock = MonotonicClock()
        self._heard_ns: dict[str, int] = {}  # of those that were adopted
        self._watch = EdgeWatch(run_dir, self._lose)  # of the same
        self._looks: asyncio.TimerHandle | None = None
        self._looked_ns = 0
        self._left = asyncio.Event()  # set whenever one of them is gone
        self._incarnations: dict[str, int] = {}
        self._engines: dict[str, EngineUp] = {}
        self._status = EdgeStatus("")
        self._supervisor: Supervisor | None = None

    @property
    def running(self) -> list[tuple[str, int]]:
        """Names and incarnations of those that were started."""
        return list(self._incarnations.items())

    @property
    def num_restarts(self) -> int:
        return self._supervisor.core.restarts_by_kind["edge"] if self._supervisor is not None else 0

    @property
    def num_late_messages(self) -> int:
        return self._supervisor.core.num_late_messages if self._supervisor is not None else 0

    async def start(
        self, config: EngineConfig, settings: ServerSettings, facts: ModelFacts, host: str, port: int
    ) -> None:
        """Have them serve beside edge 0, on the port that it listens on."""
        self._serve = (config, settings, facts, host, port)
        children = tuple(ChildConfig(name, "edge") for name in self.names)
        self._supervisor = Supervisor(
            SupervisorConfig(
                children=children, max_silence_ns=_MAX_SILENCE_NS, max_silence_at_start_ns=_MAX_START_SILENCE_NS
            ),
            make_spec=self._make_spec,
            send=self._hear,
            elsewhere=IndependentProcesses(),
            on_exit=self._forget,
        )
        await self._supervisor.start()

    def adopt(self) -> None:
        """Take over those that an edge 0 before this one had started, from now on and whenever another one appears.

        Edge 0 may have died before it said who there is; and one that it started may not listen yet.
        """
        self._look()

    def _take_in(self, name: str, incarnation: int) -> None:
        self._incarnations[name] = incarnation
        self._heard_ns[name] = self._clock.now_ns()
        self._watch.add(name, incarnation)
        self._carrier.port.connect(name, incarnation, endpoint_of(self._run_dir, name, incarnation))
        self._post_to_engines(PeerStarted(name, incarnation))
        for message in (PeerStarted(EDGE, self._edge_incarnation), self._status, *self._engines.values()):
            self._carrier.send(name, message)

    async def wait_for_leave(self, *, but: str) -> None:
        """Until all have ended, except for one."""
        while any(name != but for name in self._incarnations):
            self._left.clear()
            await self._left.wait()

    async def close(self, grace_s: float) -> None:
        """Let them drain for so long, then end them."""
        if self._looks is not None:
            self._looks.cancel()
        self._watch.close()
        if self._supervisor is not None:
            await self._supervisor.stop(grace_s)

    def cut(self) -> None:
        """Have those that drain cut their open responses off."""
        if self._supervisor is not None:
            for name in self.names:
                if (process := self._supervisor.process(name)) is not None:
                    process.kill(CUT_SIGNAL)

    def take(self, peer: str, message: Beat | EdgeAccount | AccountAsked) -> None:
        """Take a message of one of them."""
        if isinstance(message, Beat):
            self._take_beat(message)
        elif isinstance(message, EdgeAccount):
            if message.name == peer:
                self.accounts.note(message)
        elif (told := self.accounts.answer(message)) is not None:
            self._carrier.send(peer, told)

    def _take_beat(self, beat: Beat) -> None:
        if self._supervisor is not None:
            self._supervisor.handle(beat)
        elif self._incarnations.get(beat.child) == beat.incarnation:
            self._heard_ns[beat.child] = self._clock.now_ns()

    def tell(self, message: EngineUp | EdgeStatus) -> None:
        """Tell all of them; those that start later hear of it then."""
        if isinstance(message, EngineUp):
            self._engines[message.name] = message
        elif message == self._status:
            return
        else:
            self._status = message
        for name in self._incarnations:
            self._carrier.send(name, message)

    def _look(self) -> None:
        """Adopt those that listen, and find those that have ended, are stopped, no longer listen, or are silent."""
        self._looks = asyncio.get_running_loop().call_later(_LOOK_S, self._look)
        last_ns, now_ns = self._looked_ns, self._clock.now_ns()
        self._looked_ns = now_ns
        stood_still = now_ns - last_ns > _MAX_SILENCE_NS // 2  # this process did, and heard nobody
        if stood_still:
            self._heard_ns = dict.fromkeys(self._heard_ns, now_ns)
        listening = edges_listening(self._run_dir)
        for name, incarnation in listening.items():
            if name not in self._incarnations:
                self._take_in(name, incarnation)
        self._watch.look(now_ns, stood_still=now_ns - last_ns > _MAX_LOOK_GAP_NS)
        for name, heard_ns in list(self._heard_ns.items()):
            if now_ns - heard_ns > _MAX_SILENCE_NS:
                self._watch.kill(name, f"it was silent for {(now_ns - heard_ns) / 1e9:.0f} s")
                self._lose(name, self._incarnations[name])
            elif name not in listening:
                self._lose(name, self._incarnations[name])

    def _hear(self, message: Message) -> None:
        log.error("edges.given_up", message=message)

    def _lose(self, name: str, incarnation: int) -> None:
        """One that was adopted is gone."""
        self._heard_ns.pop(name, None)
        self._watch.remove(name)
        self._forget(name, incarnation)

    def _forget(self, name: str, incarnation: int) -> None:
        """One has ended, and nobody waits any more for what it had asked for."""
        if self._incarnations.get(name) == incarnation:
            del self._incarnations[name]
            self.accounts.forget(name, incarnation)
            self._carrier.port.disconnect(name)
            remove_socket(self._run_dir, name, incarnation)
            self._post_to_engines(PeerLeft(name, incarnation))
            self._left.set()

    def _make_spec(self, start: StartProcess) -> ProcessSpec:
        name, incarnation = start.child, start.incarnation
        config, settings, facts, host, port = self._serve
        self._incarnations[name] = incarnation
        self._carrier.port.connect(name, incarnation, endpoint_of(self._run_dir, name, incarnation))
        self._carrier.send(name, self._status)
        self._post_to_engines(PeerStarted(name, incarnation))
        self._on_change()
        spec = EdgeProcessSpec(
            name=name,
            incarnation=incarnation,
            run_dir=self._run_dir,
            config=config,
            settings=settings,
            facts=facts,
            engines=tuple(self._engines.values()),
            engine_names=self._engine_names,
            host=host,
            port=port,
            log_format=self._log_format,
            edge_incarnation=self._edge_incarnation,
            nodes=self._nodes,
            digest=self._digest,
        )
        return ProcessSpec(
            title=name, target=f"{EDGE_MODULE}:run", arguments=msgspec.msgpack.encode(spec), incarnation=incarnation
        )
