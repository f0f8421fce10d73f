"""A further edge, in a process of its own: HTTP, front end, tokenizer and detokenizer beside those of edge 0."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..actors.runtime.addresses import EDGE, EDGE_INCARNATION, endpoint_of
from ..actors.runtime.asyncio_port import AsyncioPort
from ..actors.runtime.clock import MonotonicClock
from ..actors.runtime.in_process import InProcessRuntime
from ..actors.runtime.logs import configure_logs
from ..actors.runtime.port import Port
from ..actors.runtime.routes import Address
from ..messages.base import Message
from ..messages.kv import ResetPrefixCache
from ..messages.processes import EdgeStatus, EngineReport, EngineUp
from ..messages.request import RequestEnded
from ..messages.step import StepExecuted
from ..messages.system import Beat, Drain
from .edge import EdgeActors
from .edge_port import FROM_ENGINE, edge_routes, fleet_stats, log_link_event
from .engine import Engine
from .engine_link import EngineLink, FromEngine
from .engine_setup import load_tokenizer_of
from .fleet import Fleet
from .frontend import FrontEnd
from .graph import ModelFacts
from .other_edges import EdgeProcessSpec
from .server import serve_http
from .stats import EngineStats

if TYPE_CHECKING:
    from ..actors.tokenizer.hf_tokenizer import HFTokenizer

log = structlog.get_logger("octavo.edge")

BEAT_S = 0.25

_INCARNATION_BITS = 32
_EDGE_BITS = 40


def run(arguments: bytes) -> int:
    """Be an edge until told to end; `arguments` is an `EdgeProcessSpec` in msgpack."""
    spec = msgspec.msgpack.decode(arguments, type=EdgeProcessSpec)
    configure_logs(spec.log_format)
    # A terminal's Ctrl-C is for edge 0, which tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(spec))
    return 0


async def _serve(spec: EdgeProcessSpec) -> None:
    from pathlib import Path

    graph = FollowerGraph(spec, await asyncio.to_thread(load_tokenizer_of, spec.config, Path(spec.facts.folder)))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Engine.around(spec.config, graph) as engine:
        await serve_http(
            engine, spec.settings, spec.host, spec.port, stop=stop, handle_signals=False, is_port_shared=True
        )


class FollowerGraph:
    """The actors of an edge that supervises nobody: it is told which engines there are.

    Args:
        spec: as this process was started.
        tokenizer: of the model.
    """

    def __init__(self, spec: EdgeProcessSpec, tokenizer: HFTokenizer) -> None:
        loop = asyncio.get_running_loop()
        self.facts: ModelFacts = spec.facts
        self._spec = spec
        self._why_not_ready = ""
        self._restarts: dict[str, int] = {}
        self._progress = 0
        allowed = {"engine": FROM_ENGINE, EDGE: (EngineUp, EdgeStatus)}
        self._port = Port(spec.name, spec.incarnation, allowed=allowed)
        self._port.bind(endpoint_of(spec.run_dir, spec.name, spec.incarnation))
        self._port.connect(EDGE, EDGE_INCARNATION, endpoint_of(spec.run_dir, EDGE, EDGE_INCARNATION))
        self._carrier = AsyncioPort(loop, self._port, self._take, log_link_event)
        self._links = {
            name: EngineLink(name, self._carrier, spec.run_dir, deliver=self._deliver) for name in spec.engine_names
        }
        self._fleet = Fleet(list(self._links.values()), spec.config.routing)
        self._runtime = InProcessRuntime(edge_routes(), MonotonicClock(), self._on_actor_failure)
        number = int(spec.name.rpartition(" ")[2])
        first_request_id = (number << _EDGE_BITS) | (spec.incarnation << _INCARNATION_BITS)
        self._actors = EdgeActors(spec.config, self.facts, tokenizer, self._runtime, first_request_id=first_request_id)
        self._runtime.add("scheduler", self._fleet)
        self._runtime.add("kv_allocator", self._fleet)
        self._runtime.connect()
        for engine in spec.engines:
            self._meet(engine, is_first=True)
        self._beat()

    @property
    def frontend(self) -> FrontEnd:
        return self._actors.frontend

    @property
    def tokenizer(self) -> HFTokenizer:
        return self._actors.tokenizer

    @property
    def num_submitting(self) -> int:
        return self._actors.num_submitting

    @property
    def max_submitting(self) -> int:
        return self._actors.max_submitting

    @property
    def why_not_ready(self) -> str:
        return self._why_not_ready

    def send(self, message: Drain | ResetPrefixCache) -> None:
        if isinstance(message, ResetPrefixCache):  # draining is this edge's own matter: the engine serves others, too
            self._runtime.send("frontend", message)

    def stats(self) -> EngineStats:
        return fleet_stats(list(self._links.values()), self._actors, self._port, self._restarts)

    def crash_actor(self, actor: str) -> None:
        """See `EdgeActors.crash_actor`."""
        self._actors.crash_actor(actor)

    async def close(self) -> None:
        self._beats.cancel()
        await self._actors.close()
        self._carrier.close()
        self._port.close()

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
                self._links[peer].take(message)
            elif isinstance(message, EngineUp):
                self._meet(message)
            elif isinstance(message, EdgeStatus):
                self._why_not_ready = message.why_not_ready
                self._restarts = dict(message.restarts)

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, RequestEnded):
            self._fleet.note_end(message)
        self._runtime.send("scheduler", message)

    def _on_actor_failure(self, address: Address, error: Exception) -> None:
        log.error("actor.failed", actor=address, exc_info=error)
        self._why_not_ready = f"the {address} failed: {type(error).__name__}"
        self.frontend.close(self._why_not_ready)
        self.frontend.end_all("executor_lost", self._why_not_ready)

    def _beat(self) -> None:
        self._carrier.send(EDGE, Beat(self._spec.name, self._spec.incarnation, progress=self._progress))
        self._beats = asyncio.get_running_loop().call_later(BEAT_S, self._beat)
