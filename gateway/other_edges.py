"""The further edges of `--gateways N`: processes with an HTTP server of their own on the same port."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..actors.runtime.addresses import EDGE_INCARNATION, endpoint_of, remove_socket
from ..actors.runtime.processes import ProcessSpec
from ..actors.supervisor.actor import Supervisor
from ..actors.supervisor.config import ChildConfig, SupervisorConfig
from ..messages.base import Message
from ..messages.processes import EdgeStatus, EngineUp, PeerLeft, PeerStarted
from ..messages.system import Beat, StartProcess
from .config import EngineConfig
from .graph import ModelFacts
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..actors.runtime.asyncio_port import AsyncioPort

log = structlog.get_logger("octavo.edges")

EDGE_MODULE = "octavo.gateway.edge_process"

CUT_SIGNAL = signal.SIGUSR1
"""Not a second SIGTERM: the system hands over two of a kind as one if they come close together."""


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


class OtherEdges:
    """Keeps the further edges alive, and tells them what edge 0 knows.

    Args:
        num_edges: all in all; edge 0 is none of the others.
        carrier: edge 0's port; what the others send is to be given to `take`.
        run_dir: of the sockets.
        engine_names: of all replicas.
        post_to_engines: says something to every engine.
        log_format: of the processes.
        edge_incarnation: of edge 0.
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
    ) -> None:
        self.names = [f"edge {number}" for number in range(1, num_edges)]
        self._carrier = carrier
        self._run_dir = run_dir
        self._engine_names = engine_names
        self._post_to_engines = post_to_engines
        self._log_format = log_format
        self._edge_incarnation = edge_incarnation
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

    async def start(
        self, config: EngineConfig, settings: ServerSettings, facts: ModelFacts, host: str, port: int
    ) -> None:
        """Have them serve beside edge 0, on the port that it listens on.

        Raises:
            ProcessStartError: no process can be started.
        """
        self._serve = (config, settings, facts, host, port)
        children = (ChildConfig("nursery of edges", "nursery"), *(ChildConfig(name, "edge") for name in self.names))
        self._supervisor = Supervisor(
            SupervisorConfig(children=children),
            make_spec=self._make_spec,
            send=self._hear,
            modules=(EDGE_MODULE,),
            on_exit=self._forget,
        )
        await self._supervisor.start()

    async def close(self, grace_s: float) -> None:
        """Let them drain for so long, then end them."""
        if self._supervisor is not None:
            await self._supervisor.stop(grace_s)

    def cut(self) -> None:
        """Have those that drain cut their open responses off."""
        if self._supervisor is not None:
            for name in self.names:
                if (process := self._supervisor.process(name)) is not None:
                    process.kill(CUT_SIGNAL)

    def take(self, beat: Beat) -> None:
        """Take a message of one of them."""
        if self._supervisor is not None:
            self._supervisor.handle(beat)

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

    def _hear(self, message: Message) -> None:
        log.error("edges.given_up", message=message)

    def _forget(self, name: str, incarnation: int) -> None:
        """One has ended, and nobody waits any more for what it had asked for."""
        if self._incarnations.get(name) == incarnation:
            del self._incarnations[name]
            self._carrier.port.disconnect(name)
            remove_socket(self._run_dir, name, incarnation)
            self._post_to_engines(PeerLeft(name, incarnation))

    def _make_spec(self, start: StartProcess) -> ProcessSpec:
        name, incarnation = start.child, start.incarnation
        config, settings, facts, host, port = self._serve
        self._incarnations[name] = incarnation
        self._carrier.port.connect(name, incarnation, endpoint_of(self._run_dir, name, incarnation))
        self._carrier.send(name, self._status)
        self._post_to_engines(PeerStarted(name, incarnation))
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
        )
        return ProcessSpec(
            title=name, target=f"{EDGE_MODULE}:run", arguments=msgspec.msgpack.encode(spec), incarnation=incarnation
        )
