"""What keeps the processes of one engine alive: replicas, executors on other hosts, further edges.

It is a part of edge 0. Should edge 0 die while other edges still serve clients, one of them makes another.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import msgspec
import structlog

from ...actors.runtime.addresses import EDGE, EDGE_INCARNATION, TcpSettings, endpoint_of, split_endpoint
from ...actors.runtime.asyncio_port import AsyncioPort
from ...actors.runtime.port import Port
from ...actors.scheduler.quarantine import Quarantine
from ...messages.base import Message
from ...messages.errors import InvalidConfigError
from ...messages.nodes import Listening, PrepareNode
from ...messages.processes import AccountAsked, EdgeAccount, EdgeStatus, EngineStuck, ExecutorLoaded, LoadFailed
from ...messages.system import Beat, ExecutorFailed, ExecutorReady
from ..config import EngineConfig, NodesConfig
from ..graph import ModelFacts
from .drop_tally import DropTally
from .edge_port import FROM_ENGINE, log_link_event
from .engine_link import FromEngine
from .nodes import FROM_NODE, FromNode, Nodes
from .other_edges import OtherEdges
from .replica import Replica, executor_names

log = structlog.get_logger("octavo.supervision")

_FROM_EXECUTOR = (ExecutorLoaded, LoadFailed, ExecutorReady, ExecutorFailed, Listening)


class Supervision:
    """The port that is called edge 0's, and everybody who is supervised from there.

    Args:
        config: of the engine.
        folder: of the checkpoint.
        num_edges: all in all.
        log_format: of the processes.
        run_dir: of the sockets.
        footing: how it presents itself.
        nodes: other hosts that run executors; `digest` is what their checkpoint must be.
        deliver: where steps and ends go that the streams of this process wait for.
        on_change: called whenever `why_not_ready` of a replica may have changed.
        on_give_up: called with index and reason of a replica that will not be replaced.

    Attributes:
        port: of the supervision.
        replicas: an engine and its executors each.
        nodes: None without other hosts.
        others: the further edges; None if there are none.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: str,
        num_edges: int,
        log_format: str,
        *,
        run_dir: str,
        footing: Footing,
        nodes: NodesConfig | None = None,
        digest: str = "",
        deliver: Callable[[FromEngine], None],
        on_change: Callable[[], None] = lambda: None,
        on_give_up: Callable[[int, str], None],
    ) -> None:
        self._on_change_of_replica = on_change
        self._on_give_up_of_replica = on_give_up
        self.port, nodes = _open_port(run_dir, footing, nodes)
        self._failed_because = ""
        loop = asyncio.get_running_loop()
        self._carrier = AsyncioPort(loop, self.port, self._take, log_link_event, on_failure=self._fail)
        engine_names = _engine_names(config)
        self.others: OtherEdges | None = None
        if num_edges > 1:
            self.others = OtherEdges(
                num_edges,
                self._carrier,
                run_dir,
                engine_names=tuple(engine_names),
                post_to_engines=self._post_to_engines,
                log_format=log_format,
                edge_incarnation=footing.incarnation,
                nodes=nodes,
                digest=digest,
                on_change=self._on_change,
            )
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
        quarantine = Quarantine()
        self._drops = DropTally()
        self._late_compilations = DropTally()
        self.replicas: list[Replica] = []
        for index, name in enumerate(engine_names):
            replica = Replica(
                index,
                name,
                config,
                folder,
                carrier=self._carrier,
                run_dir=run_dir,
                deliver=deliver,
                on_change=self._on_change,
                on_give_up=partial(self._on_give_up, index),
                others=self.others,
                quarantine=quarantine,
                log_format=log_format,
                edge_incarnation=footing.incarnation,
                nodes=self.nodes,
                tcp=footing.tcp,
                num_before=footing.num_before,
            )
            self.replicas.append(replica)
        self._by_process = {
            name: replica for replica in self.replicas for name in (replica.engine_name, *replica.executor_names)
        }

    async def start(self) -> None:
        """Start the processes, once enough other hosts are there.

        Raises:
            ProcessStartError: the system gives no more processes.
            NodesMissingError: other hosts did not join in time.
        """
        if self.nodes is not None:
            await self.nodes.complete()
        for replica in self.replicas:
            await replica.start()

    def assume(self, facts: ModelFacts, mailbox_capacity: int) -> None:
        """What was loaded before will be loaded again; engines need not wait for it. Call it before `start`."""
        for replica in self.replicas:
            replica.assume(facts, mailbox_capacity)

    @property
    def why_not_ready(self) -> str:
        """Empty if a request sent now to some replica would be answered."""
        reasons = [replica.why_not_ready for replica in self.replicas]
        return self._failed_because or (reasons[0] if all(reasons) else "")

    @property
    def is_broken(self) -> bool:
        """Whether no replica will ever answer again."""
        return bool(self._failed_because) or all(replica.has_given_up for replica in self.replicas)

    @property
    def restarts(self) -> dict[str, int]:
        """How often each kind of process was replaced."""
        restarts = {"edge": self.others.num_restarts if self.others is not None else 0}
        for replica in self.replicas:
            for kind, number in replica.restarts.items():
                restarts[kind] = restarts.get(kind, 0) + number
        return restarts

    @property
    def messages_dropped(self) -> Counter[str]:
        """By reason, of executors and nodes as they tell it; `late`: of what the supervisor itself had no use for."""
        dropped = self._drops.totals
        dropped["late"] += sum(replica.num_late_messages for replica in self.replicas)
        if self.others is not None:
            dropped["late"] += self.others.num_late_messages
        return dropped

    @property
    def num_late_compilations(self) -> int:
        """Of executors, after they were ready, as they tell it."""
        return self._late_compilations.totals.total()

    async def close(self) -> None:
        """End the processes."""
        if self.others is not None:
            await self.others.close(0.5)
        if self.nodes is not None:
            self.nodes.close()
        await asyncio.gather(*(replica.close() for replica in self.replicas))
        if self.nodes is not None:
            self.nodes.end()
        self._carrier.close()
        self.port.close()

    def _fail(self, error: Exception) -> None:
        """A message could not be taken, and what it was about is lost: every stream ends, nobody is supervised now."""
        self._failed_because = f"the supervision failed: {type(error).__name__}"
        for replica in self.replicas:
            replica.give_up(self._failed_because)

    def _take(self, messages: list[tuple[str, Message]]) -> None:
        for peer, message in messages:
            if self.nodes is not None and isinstance(message, FromNode) and peer.startswith("node "):
                if isinstance(message, Beat):
                    self._drops.note(peer, message.incarnation, message.messages_dropped)
                self.nodes.take(peer, message)
                continue
            if isinstance(message, Beat):
                replica = self._by_process.get(message.child)
                if replica is not None:
                    self._drops.note(message.child, message.incarnation, message.messages_dropped)
                    late = (("", message.num_late_compilations),)
                    self._late_compilations.note(message.child, message.incarnation, late)
                elif self.others is not None:
                    self.others.take(peer, message)
            elif isinstance(message, EdgeAccount | AccountAsked):
                if self.others is not None:
                    self.others.take(peer, message)
                continue
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
        self._on_change_of_replica()
        if self.others is not None:
            down = tuple(replica.engine_name for replica in self.replicas if replica.why_not_ready)
            gone = tuple(replica.engine_name for replica in self.replicas if replica.link.is_gone)
            self.others.tell(EdgeStatus(self.why_not_ready, tuple(self.restarts.items()), down, gone))

    def _on_give_up(self, index: int, why: str) -> None:
        self._on_give_up_of_replica(index, why)
        self._on_change()


class Footing(NamedTuple):
    """How the supervision presents itself to its processes.

    Attributes:
        incarnation: of edge 0.
        tcp: how it and its engines listen to other hosts; None: not at all.
        elsewhere: executors on those hosts.
        num_before: incarnations and epochs that supervisions before this one may have used.
    """

    incarnation: int
    tcp: TcpSettings | None = None
    elsewhere: tuple[str, ...] = ()
    num_before: int = 0

    @classmethod
    def of(cls, config: EngineConfig, nodes: NodesConfig | None, *, incarnation: int = 0, num_before: int = 0) -> Self:
        """Of edge 0, or with `incarnation` of one that comes after it."""
        if nodes is None:
            return cls(incarnation or EDGE_INCARNATION, num_before=num_before)
        elsewhere = _children_elsewhere(config, nodes)
        # Another in each run, so that what other hosts still say to the last one is not taken for this one's.
        incarnation = incarnation or time.time_ns() // 1_000_000
        tcp = TcpSettings(host=split_endpoint(nodes.listen)[0], keys=nodes.keys, allow_list=nodes.allow_list)
        return cls(incarnation, tcp, elsewhere, num_before)


def _engine_names(config: EngineConfig) -> list[str]:
    """Of each replica's."""
    if config.data_parallel_size == 1:
        return ["engine"]
    return [f"engine {index}" for index in range(config.data_parallel_size)]


def _open_port(run_dir: str, footing: Footing, nodes: NodesConfig | None) -> tuple[Port, NodesConfig | None]:
    """Edge 0's port, listening, and where other hosts find it."""
    port = _make_port(footing.incarnation, nodes, footing.tcp)
    try:
        port.bind(endpoint_of(run_dir, EDGE, footing.incarnation))
        if nodes is not None:
            nodes = msgspec.structs.replace(nodes, listen=port.bind(nodes.listen))
            log.info("nodes.listening", endpoint=nodes.listen)
    except BaseException:
        port.close()
        raise
    return port, nodes


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
            "edge": (Beat, EngineStuck, EdgeAccount, AccountAsked),
            **({"node": FROM_NODE} if nodes is not None else {}),
        },
        allow_plain_loopback=nodes is not None and nodes.plain_loopback,
        self_announced=("node",),  # of two of one name the first ends, and says so
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
