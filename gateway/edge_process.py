"""A further edge, in a process of its own: HTTP, front end, tokenizer and detokenizer beside those of edge 0."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from ..actors.engine.peers import first_request_id
from ..actors.runtime.addresses import EDGE, endpoint_of
from ..actors.runtime.asyncio_port import AsyncioPort
from ..actors.runtime.logs import configure_logs
from ..actors.runtime.port import Port
from ..actors.scheduler.quarantine import Quarantine
from ..messages.base import Message
from ..messages.kv import ResetPrefixCache
from ..messages.processes import EdgeStatus, EngineReport, EngineStuck, EngineUp
from ..messages.request import RequestEnded
from ..messages.step import StepExecuted
from ..messages.system import Beat, Drain
from .edge_graph import EdgeGraph
from .edge_port import FROM_ENGINE, log_link_event
from .engine import Engine
from .engine_link import EngineLink
from .engine_setup import load_tokenizer_of
from .other_edges import CUT_SIGNAL, EdgeProcessSpec
from .server import serve_http

if TYPE_CHECKING:
    from ..actors.tokenizer.hf_tokenizer import HFTokenizer

BEAT_S = 0.25


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
    stop, abort = asyncio.Event(), asyncio.Event()

    def cut() -> None:
        stop.set()
        abort.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(CUT_SIGNAL, cut)
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


class FollowerGraph(EdgeGraph):
    """The actors of an edge that supervises nobody: edge 0 tells it which engines there are.

    Args:
        spec: as this process was started.
        tokenizer: of the model.
    """

    def __init__(self, spec: EdgeProcessSpec, tokenizer: HFTokenizer) -> None:
        loop = asyncio.get_running_loop()
        self._spec = spec
        self._status = EdgeStatus("")
        self._progress = 0
        port = Port(spec.name, spec.incarnation, allowed={"engine": FROM_ENGINE, EDGE: (EngineUp, EdgeStatus)})
        port.bind(endpoint_of(spec.run_dir, spec.name, spec.incarnation))
        port.connect(EDGE, spec.edge_incarnation, endpoint_of(spec.run_dir, EDGE, spec.edge_incarnation))
        self._carrier = AsyncioPort(loop, port, self._take, log_link_event)
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

    def send(self, message: Drain | ResetPrefixCache) -> None:
        if isinstance(message, ResetPrefixCache):  # draining is this edge's own matter: the engine serves others, too
            super().send(message)

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
                self._follow(message)

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
        self._beats = asyncio.get_running_loop().call_later(BEAT_S, self._beat)
