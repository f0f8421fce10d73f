"""The graph of actors over several processes: this one is the edge, engines and executors are its children."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Self

import structlog

from ..actors.runtime.addresses import EDGE, EDGE_INCARNATION, endpoint_of
from ..actors.runtime.asyncio_port import AsyncioPort
from ..actors.runtime.clock import MonotonicClock
from ..actors.runtime.in_process import InProcessRuntime
from ..actors.runtime.port import Port
from ..actors.runtime.process_title import set_title
from ..actors.runtime.routes import Address
from ..actors.runtime.run_dir import RunDir
from ..messages.base import Message
from ..messages.errors import ExecutorLostError
from ..messages.kv import ResetPrefixCache
from ..messages.processes import EdgeStatus, ExecutorLoaded, LoadFailed
from ..messages.request import RequestEnded
from ..messages.system import Beat, Drain, ExecutorFailed, ExecutorReady
from .config import EngineConfig
from .edge import EdgeActors
from .edge_port import FROM_ENGINE, edge_routes, fleet_stats, log_link_event
from .engine_link import FromEngine
from .engine_setup import journal_file, load_tokenizer_of
from .fleet import Fleet
from .frontend import FrontEnd
from .graph import ModelFacts
from .other_edges import OtherEdges
from .replica import Replica
from .stats import EngineStats

if TYPE_CHECKING:
    from ..actors.tokenizer.hf_tokenizer import HFTokenizer

log = structlog.get_logger("octavo.graph")

_FROM_EXECUTOR = (ExecutorLoaded, LoadFailed, ExecutorReady, ExecutorFailed)


class ProcessGraph:
    """The edge's actors here, the others in processes that are replaced when they die. Made by `ProcessGraph.start`.

    Attributes:
        others: the further edges, if there are any.
    """

    def __init__(self, config: EngineConfig, folder: str, num_edges: int, log_format: str) -> None:
        loop = asyncio.get_running_loop()
        self._config = config
        self._broken_because = ""
        self._run_dir = RunDir()
        run_dir = str(self._run_dir.path)
        self._facts: ModelFacts | None = None
        self._edge: EdgeActors | None = None
        set_title(EDGE)
        allowed = {"engine": FROM_ENGINE, "executor": _FROM_EXECUTOR, "beat": (Beat,), "edge": (Beat,)}
        self._port = Port(EDGE, EDGE_INCARNATION, allowed=allowed)
        self._port.bind(endpoint_of(run_dir, EDGE, EDGE_INCARNATION))
        self._carrier = AsyncioPort(loop, self._port, self._take, log_link_event)
        self._runtime = InProcessRuntime(edge_routes(), MonotonicClock(), self._on_actor_failure)
        names = ["engine"]
        if config.data_parallel_size > 1:
            names = [f"engine {index}" for index in range(config.data_parallel_size)]
        self.others: OtherEdges | None = None
        if num_edges > 1:
            self.others = OtherEdges(
                num_edges,
                self._carrier,
                run_dir,
                engine_names=tuple(names),
                post_to_engines=self._post_to_engines,
                log_format=log_format,
            )
        self.replicas = [
            Replica(
                index,
                name,
                config,
                folder,
                carrier=self._carrier,
                run_dir=run_dir,
                deliver=self._deliver,
                on_change=self._on_change,
                on_give_up=partial(self._on_give_up, index),
                others=self.others,
                log_format=log_format,
            )
            for index, name in enumerate(names)
        ]
        self._fleet = Fleet([replica.link for replica in self.replicas], config.routing)
        self._by_process = {
            name: replica for replica in self.replicas for name in (replica.engine_name, *replica.executor_names)
        }

    @classmethod
    async def start(cls, config: EngineConfig, *, num_edges: int = 1, log_format: str = "auto") -> Self:
        """Start the processes, load the model, and return once a request would be served.

        Raises:
            ModelNotFoundError, UnsupportedModelError, KVCacheTooSmallError: what is wrong and what to change.
            ProcessStartError: the system gives no more processes.
        """
        from ..actors.executor.locate import locate_model

        journal_file(config.journal)  # fails now, not when the model is loaded
        folder, name = await asyncio.to_thread(
            locate_model,
            config.model,
            revision=config.revision,
            offline=config.offline,
            trust_remote_code=config.trust_remote_code,
        )
        graph = cls(config, str(folder), num_edges, log_format)
        try:
            tokenizing = asyncio.create_task(asyncio.to_thread(load_tokenizer_of, config, folder))
            for replica in graph.replicas:
                await replica.start()
            loaded = [await replica.loaded for replica in graph.replicas]
            graph._build_edge(name, str(folder), loaded, await tokenizing)
            for replica in graph.replicas:
                await replica.ready.wait()
            if graph._broken_because:
                raise ExecutorLostError(graph._broken_because)
        except BaseException:
            await graph.close()
            raise
        return graph

    def _build_edge(self, name: str, folder: str, loaded: list[ExecutorLoaded], tokenizer: HFTokenizer) -> None:
        self._facts = facts = ModelFacts(
            name=name,
            folder=folder,
            vocab_size=loaded[0].vocab_size,
            max_model_len=min(one.max_model_len for one in loaded),
            num_blocks=min(one.num_blocks for one in loaded),
            kv_cache_bytes=min(one.kv_cache_bytes for one in loaded),
            dtype=loaded[0].dtype,
            load_seconds=max(one.load_seconds for one in loaded),
        )
        self._edge = EdgeActors(self._config, facts, tokenizer, self._runtime)
        self._runtime.add("scheduler", self._fleet)
        self._runtime.add("kv_allocator", self._fleet)
        self._runtime.connect()
        for replica in self.replicas:
            replica.set_up(facts, self._edge.capacity)

    # ---- what the engine asks ----

    @property
    def facts(self) -> ModelFacts:
        assert self._facts is not None
        return self._facts

    @property
    def _actors(self) -> EdgeActors:
        assert self._edge is not None
        return self._edge

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
        if self._broken_because:
            return self._broken_because
        reasons = [replica.why_not_ready for replica in self.replicas]
        return reasons[0] if all(reasons) else ""

    def send(self, message: Drain | ResetPrefixCache) -> None:
        self._runtime.send("frontend", message)

    def stats(self) -> EngineStats:
        restarts: dict[str, int] = {"edge": self.others.num_restarts if self.others is not None else 0}
        for replica in self.replicas:
            for kind, number in replica.restarts.items():
                restarts[kind] = restarts.get(kind, 0) + number
        return fleet_stats(self._fleet.links, self._actors, self._port, restarts)

    def crash_actor(self, actor: str) -> None:
        """See `EdgeActors.crash_actor`."""
        self._actors.crash_actor(actor)

    async def close(self) -> None:
        if self._edge is not None:
            await self._edge.close()
        if self.others is not None:
            await self.others.close(0.5)
        await asyncio.gather(*(replica.close() for replica in self.replicas))
        self._carrier.close()
        self._port.close()
        self._run_dir.remove()

    # ---- carrying ----

    def _take(self, messages: list[tuple[str, Message]]) -> None:
        for peer, message in messages:
            if isinstance(message, Beat):
                replica = self._by_process.get(message.child)
                if replica is None and self.others is not None:
                    self.others.take(message)
            else:
                replica = self._by_process.get(peer)
            if replica is not None:
                replica.take(message)

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, RequestEnded):
            self._fleet.note_end(message)
        self._runtime.send("scheduler", message)

    def _post_to_engines(self, message: Message) -> None:
        for replica in self.replicas:
            replica.link.send(message)

    def _on_change(self) -> None:
        for index, replica in enumerate(self.replicas):
            self._fleet.set_up(index, is_up=not replica.why_not_ready)
        if self.others is not None:
            self.others.tell(EdgeStatus(self.why_not_ready))

    def _on_give_up(self, index: int, why: str) -> None:
        if not self._fleet.abandon(index):
            self._break(why)

    def _on_actor_failure(self, address: Address, error: Exception) -> None:
        log.error("actor.failed", actor=address, exc_info=error)
        self._break(f"the {address} failed: {type(error).__name__}")

    def _break(self, why: str) -> None:
        self._broken_because = self._broken_because or why
        if self._edge is not None:
            self.frontend.close(why)
            self.frontend.end_all("executor_lost", why)
