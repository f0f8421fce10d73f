"""The graph of actors over several processes: this one is the edge, engines and executors are its children."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Self

import structlog

from ..actors.runtime.addresses import EDGE, EDGE_INCARNATION, TcpSettings, endpoint_of, split_endpoint
from ..actors.runtime.asyncio_port import AsyncioPort
from ..actors.runtime.port import Port
from ..actors.runtime.process_title import set_title
from ..actors.runtime.run_dir import RunDir
from ..actors.scheduler.quarantine import Quarantine
from ..messages.base import Message
from ..messages.errors import ExecutorLostError, InvalidConfigError
from ..messages.nodes import Listening, PrepareNode
from ..messages.processes import EdgeStatus, EngineStuck, ExecutorLoaded, LoadFailed
from ..messages.system import Beat, ExecutorFailed, ExecutorReady
from .checkpoint_digest import checkpoint_digest
from .config import EngineConfig, NodesConfig
from .edge_graph import EdgeGraph
from .edge_port import FROM_ENGINE, log_link_event
from .engine_setup import journal_file, load_tokenizer_of
from .graph import ModelFacts
from .nodes import FROM_NODE, FromNode, Nodes
from .other_edges import OtherEdges
from .replica import Replica, executor_names

log = structlog.get_logger("octavo.graph")

if TYPE_CHECKING:
    from ..actors.tokenizer.hf_tokenizer import HFTokenizer

_FROM_EXECUTOR = (ExecutorLoaded, LoadFailed, ExecutorReady, ExecutorFailed, Listening)


class ProcessGraph(EdgeGraph):
    """The edge's actors here, the others in processes that are replaced when they die. Made by `ProcessGraph.start`.

    Attributes:
        others: the further edges, if there are any.
        replicas: an engine and its executors each.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: str,
        num_edges: int,
        log_format: str,
        *,
        nodes: NodesConfig | None = None,
        digest: str = "",
    ) -> None:
        footing = _Footing.of(config, nodes)
        port = _make_port(footing.incarnation, nodes, footing.tcp)
        self._run_dir = RunDir()
        set_title(EDGE)
        try:
            port.bind(endpoint_of(str(self._run_dir.path), EDGE, footing.incarnation))
            if nodes is not None:
                log.info("nodes.listening", endpoint=port.bind(nodes.listen))
        except BaseException:
            port.close()
            self._run_dir.remove()
            raise
        self._carrier = AsyncioPort(asyncio.get_running_loop(), port, self._take, log_link_event)
        self.others = self._make_others(num_edges, config, footing, log_format)
        self.nodes: Nodes | None = None
        if nodes is not None:
            self.nodes = Nodes(
                nodes,
                self._carrier,
                incarnation=footing.incarnation,
                children=footing.elsewhere,
                prepare=PrepareNode(config.model, config.revision, digest),
                on_change=self._on_change,
            )
        self.replicas = self._make_replicas(config, folder, footing, log_format)
        super().__init__(config, port, [replica.link for replica in self.replicas])
        self._by_process = {
            name: replica for replica in self.replicas for name in (replica.engine_name, *replica.executor_names)
        }

    def _make_others(
        self, num_edges: int, config: EngineConfig, footing: _Footing, log_format: str
    ) -> OtherEdges | None:
        if num_edges <= 1:
            return None
        return OtherEdges(
            num_edges,
            self._carrier,
            str(self._run_dir.path),
            engine_names=tuple(_engine_names(config)),
            post_to_engines=self._post_to_engines,
            log_format=log_format,
            edge_incarnation=footing.incarnation,
        )

    def _make_replicas(self, config: EngineConfig, folder: str, footing: _Footing, log_format: str) -> list[Replica]:
        quarantine = Quarantine()
        return [
            Replica(
                index,
                name,
                config,
                folder,
                carrier=self._carrier,
                run_dir=str(self._run_dir.path),
                deliver=self._deliver,
                on_change=self._on_change,
                on_give_up=partial(self._on_give_up, index),
                others=self.others,
                quarantine=quarantine,
                log_format=log_format,
                edge_incarnation=footing.incarnation,
                nodes=self.nodes,
                tcp=footing.tcp,
            )
            for index, name in enumerate(_engine_names(config))
        ]

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        num_edges: int = 1,
        log_format: str = "auto",
        nodes: NodesConfig | None = None,
    ) -> Self:
        """Start the processes, load the model, and return once a request would be served.

        Raises:
            ModelNotFoundError, UnsupportedModelError, KVCacheTooSmallError: what is wrong and what to change.
            ProcessStartError: the system gives no more processes.
            NodesMissingError: other hosts did not join in time.
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
        digest = await asyncio.to_thread(checkpoint_digest, folder) if nodes is not None else ""
        graph = cls(config, str(folder), num_edges, log_format, nodes=nodes, digest=digest)
        tokenizing = asyncio.create_task(asyncio.to_thread(load_tokenizer_of, config, folder))
        try:
            if graph.nodes is not None:
                await graph.nodes.complete()
            for replica in graph.replicas:
                await replica.start()
            loaded = [await replica.loaded for replica in graph.replicas]
            graph._build_edge(name, str(folder), loaded, await tokenizing)
            for replica in graph.replicas:
                await replica.ready.wait()
            if graph._broken_because:
                raise ExecutorLostError(graph._broken_because)
        except BaseException:
            tokenizing.cancel()
            await graph.close()
            await asyncio.gather(tokenizing, return_exceptions=True)
            raise
        return graph

    def _build_edge(self, name: str, folder: str, loaded: list[ExecutorLoaded], tokenizer: HFTokenizer) -> None:
        facts = ModelFacts(
            name=name,
            folder=folder,
            vocab_size=loaded[0].vocab_size,
            max_model_len=min(one.max_model_len for one in loaded),
            num_blocks=min(one.num_blocks for one in loaded),
            kv_cache_bytes=min(one.kv_cache_bytes for one in loaded),
            dtype=loaded[0].dtype,
            load_seconds=max(one.load_seconds for one in loaded),
        )
        capacity = self._add_actors(facts, tokenizer).capacity
        for replica in self.replicas:
            replica.set_up(facts, capacity)

    # ---- what the engine asks ----

    @property
    def why_not_ready(self) -> str:
        if self._broken_because:
            return self._broken_because
        reasons = [replica.why_not_ready for replica in self.replicas]
        return reasons[0] if all(reasons) else ""

    @property
    def restarts(self) -> dict[str, int]:
        restarts = {"edge": self.others.num_restarts if self.others is not None else 0}
        for replica in self.replicas:
            for kind, number in replica.restarts.items():
                restarts[kind] = restarts.get(kind, 0) + number
        return restarts

    async def close(self) -> None:
        if self._edge is not None:
            await self._edge.close()
        if self.others is not None:
            await self.others.close(0.5)
        if self.nodes is not None:
            self.nodes.close()
        await asyncio.gather(*(replica.close() for replica in self.replicas))
        if self.nodes is not None:
            self.nodes.end()
        self._carrier.close()
        self._port.close()
        self._run_dir.remove()

    # ---- carrying ----

    def _take(self, messages: list[tuple[str, Message]]) -> None:
        for peer, message in messages:
            if self.nodes is not None and isinstance(message, FromNode) and peer.startswith("node "):
                self.nodes.take(peer, message)
                continue
            if isinstance(message, Beat):
                replica = self._by_process.get(message.child)
                if replica is None and self.others is not None:
                    self.others.take(message)
            elif isinstance(message, EngineStuck):
                replica = self._by_process.get(message.name)
            else:
                replica = self._by_process.get(peer)
            if replica is not None:
                replica.take(message)

    def _post_to_engines(self, message: Message) -> None:
        for replica in self.replicas:
            replica.link.send(message)

    def _on_change(self) -> None:
        """Tell whoever must know which engines take requests."""
        engines_down = []
        for index, replica in enumerate(self.replicas):
            is_up = not replica.why_not_ready
            self._fleet.set_up(index, is_up=is_up)
            if not is_up:
                engines_down.append(replica.engine_name)
        if self.others is not None:
            gone = (link.name for link in self._fleet.links if link.is_gone)
            self.others.tell(
                EdgeStatus(self.why_not_ready, tuple(self.restarts.items()), tuple(engines_down), tuple(gone))
            )

    def _on_give_up(self, index: int, why: str) -> None:
        if not self._fleet.abandon(index):
            self._break(why)
        self._on_change()


class _Footing(NamedTuple):
    """How edge 0 presents itself to its processes.

    Attributes:
        incarnation: of edge 0.
        tcp: how it and its engines listen to other hosts; None: not at all.
        elsewhere: executors on those hosts.
    """

    incarnation: int
    tcp: TcpSettings | None = None
    elsewhere: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: EngineConfig, nodes: NodesConfig | None) -> Self:
        if nodes is None:
            return cls(EDGE_INCARNATION)
        elsewhere = _children_elsewhere(config, nodes)
        # Another in each run, so that what other hosts still say to the last one is not taken for this one's.
        incarnation = time.time_ns() // 1_000_000
        tcp = TcpSettings(host=split_endpoint(nodes.listen)[0], keys=nodes.keys, allow_list=nodes.allow_list)
        return cls(incarnation, tcp, elsewhere)


def _engine_names(config: EngineConfig) -> list[str]:
    """Of each replica's."""
    if config.data_parallel_size == 1:
        return ["engine"]
    return [f"engine {index}" for index in range(config.data_parallel_size)]


def _make_port(incarnation: int, nodes: NodesConfig | None, tcp: TcpSettings | None) -> Port:
    """Edge 0's port: who may tell it what."""
    return Port(
        EDGE,
        incarnation,
        keys=tcp.read_keys() if tcp is not None else None,
        allowed={
            "engine": (*FROM_ENGINE, Listening),
            "executor": _FROM_EXECUTOR,
            "beat": (Beat,),
            "edge": (Beat, EngineStuck),
            **({"node": FROM_NODE} if nodes is not None else {}),
        },
        allow_plain_loopback=nodes is not None and nodes.plain_loopback,
    )


def _children_elsewhere(config: EngineConfig, nodes: NodesConfig) -> tuple[str, ...]:
    """The executors that run on nodes: all but this host's share."""
    names = [name for index in range(config.data_parallel_size) for name in executor_names(config, index)]
    num_local = nodes.local_executors
    if num_local is None:
        num_local = len(names) // (nodes.num_nodes + 1)
    if num_local >= len(names):
        raise InvalidConfigError(
            f"local_executors is {num_local} of {len(names)}, so nodes have nothing to run: lower it, or leave out "
            "where they join (--listen)",
            field="local_executors",
        )
    return tuple(names[num_local:])
