"""The nodes that have joined: other hosts, on which edge 0 places executors."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog

from ...actors.runtime.addresses import EDGE, split_endpoint
from ...actors.runtime.awake_time import wait_awake
from ...actors.runtime.processes import ProcessExit, ProcessSpec, ProcessStartError
from ...messages.base import Message
from ...messages.errors import InvalidConfigError, OctavoError
from ...messages.nodes import (
    ExitedOnNode,
    JoinAgain,
    KillOnNode,
    NodeJoined,
    NodeLeft,
    NodePrepared,
    NodeUnfit,
    PrepareNode,
    StartedOnNode,
    StartOnNode,
)
from ...messages.system import Beat
from ..config import NodesConfig

if TYPE_CHECKING:
    from ...actors.runtime.asyncio_port import AsyncioPort

log = structlog.get_logger("octavo.nodes")

TICK_S = 0.1
MAX_SILENT_TICKS = 15
"""A node is given up after so many ticks without a beat. Ticks, not time: none pass while this process stands still."""

QUIET_TICKS = 5
"""After so many its beats are missed: what it runs may be well, and as little heard."""

BEAT_TICKS = 3

FORGET_TICKS = 3000
"""How long a node that is lost may come back as the one it was, to be told to begin again."""

FROM_NODE = (NodeJoined, NodePrepared, NodeUnfit, NodeLeft, StartedOnNode, ExitedOnNode, Beat)
FromNode = NodeJoined | NodePrepared | NodeUnfit | NodeLeft | StartedOnNode | ExitedOnNode | Beat


class NodesMissingError(OctavoError):
    """Too few nodes have joined."""

    code = "nodes_missing"


class RemoteProcess:
    """An executor on a node."""

    is_here = False  # its pid may be somebody else's on this host

    def __init__(self, child: str, incarnation: int, node: _Node, kill: Callable[[KillOnNode], None]) -> None:
        self.child = child
        self.incarnation = incarnation
        self.node = node
        self.pid = 0
        self._kill = kill
        self._exit: asyncio.Future[ProcessExit] = asyncio.get_running_loop().create_future()

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Signal it; a node that does not answer is given up soon, and its processes with it."""
        if not self._exit.done():
            self._kill(KillOnNode(self.child, self.incarnation, signum))

    async def wait(self) -> ProcessExit:
        """How it ended, once it has, as far as anybody here can tell."""
        return await asyncio.shield(self._exit)

    async def stop(self, grace_s: float = 5.0) -> ProcessExit:
        """Ask it to end, and kill it if it has not after `grace_s` seconds."""
        self.kill(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            return await wait_awake(self.wait(), grace_s)
        self.kill()
        return await self.wait()

    def end(self, why: str, *, is_innocent: bool) -> None:
        """It has ended, or its node is gone."""
        if not self._exit.done():
            self._exit.set_result(ProcessExit(None, why, is_innocent))


class _Node:
    """A node as it joined."""

    def __init__(self, joined: NodeJoined) -> None:
        self.name = joined.name
        self.incarnation = joined.incarnation
        self.server_key = joined.server_key
        self.num_slots = joined.num_slots
        self.rank = joined.rank
        self.is_prepared = False
        self.num_silent_ticks = 0
        self.processes: dict[str, RemoteProcess] = {}

    @property
    def has_room(self) -> bool:
        return self.is_prepared and (not self.num_slots or len(self.processes) < self.num_slots)


class Nodes:
    """Welcomes nodes, places executors on them, and notices when they are gone.

    A node that has been silent for 1.5 s, or says farewell, counts as dead with all its executors. What it had goes to
    another node with room, or waits for one. A node that was only out of reach hears, once it is back, that it must
    begin again: it kills what it still has, so that no two hosts ever run the same executor for long, and what the old
    ones still say is of an older incarnation and epoch.

    Args:
        config: how many, and how long they are waited for.
        carrier: edge 0's port; messages of nodes are to be given to `take`.
        incarnation: of edge 0.
        children: names of the executors that nodes run.
        prepare: what a node is welcomed with.
        on_change: called whenever `why_waiting` may have changed.
    """

    def __init__(
        self,
        config: NodesConfig,
        carrier: AsyncioPort,
        *,
        incarnation: int,
        children: tuple[str, ...],
        prepare: PrepareNode,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._carrier = carrier
        self._incarnation = incarnation
        self._children = children
        self._prepare = prepare
        self._on_change = on_change
        self._nodes: dict[str, _Node] = {}  # by name of the peer
        self._dead: dict[str, int] = {}  # incarnation that was given up
        self._lost_at: dict[str, int] = {}  # when, in ticks
        self._waiting: dict[str, tuple[ProcessSpec, asyncio.Future[RemoteProcess]]] = {}
        self._complete = asyncio.Event()  # as many were there as are needed at the start
        self._is_closing = False
        self._unfit_because = ""
        self._num_ticks = 0
        self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    async def complete(self) -> None:
        """Return once enough nodes are there.

        Raises:
            NodesMissingError: they did not come in time.
        """
        log.info("nodes.awaited", listen=self._config.listen, num_nodes=self._config.num_nodes)
        try:
            await asyncio.wait_for(self._complete.wait(), self._config.timeout_s)
        except TimeoutError:
            raise NodesMissingError(
                f"{self._num_prepared} of {self._config.num_nodes} nodes joined {self._config.listen} within "
                f"{self._config.timeout_s:g} s{self._unfit_because}: start `octavo node --join` on the others, or "
                "lower --nodes"
            ) from None

    def close(self) -> None:
        """Place nothing any more; what waits for a node is refused. Nodes are still heard, and found silent."""
        self._is_closing = True
        for child in list(self._waiting):
            self.withdraw(child)

    def end(self) -> None:
        """Hear of nobody any more; after `close`, once the executors have ended."""
        self._ticker.cancel()

    @property
    def why_waiting(self) -> str:
        """Empty unless an executor has no node."""
        if not self._waiting:
            return ""
        return (
            f"{', '.join(self._waiting)}: no node has room, {self._num_prepared} of {self._config.num_nodes} are here"
        )

    @property
    def _num_prepared(self) -> int:
        return sum(node.is_prepared for node in self._nodes.values())

    # ---- processes: what a supervisor asks ----

    def hosts(self, child: str) -> bool:
        """Whether a child runs on a node."""
        return child in self._children

    def is_out_of_reach(self, child: str) -> bool:
        """Whether the node of a child is silent, too; if it stays so, it is given up, and the child with it."""
        return any(child in node.processes and node.num_silent_ticks > QUIET_TICKS for node in self._nodes.values())

    def key_of(self, child: str) -> str:
        """The CURVE public key of the node that runs a child; empty without keys, or if none does."""
        return next((node.server_key for node in self._nodes.values() if child in node.processes), "")

    async def spawn(self, spec: ProcessSpec) -> RemoteProcess:
        """Start an executor on a node, once one has room.

        Raises:
            ProcessStartError: none had in time, or it is not wanted any more.
        """
        if self._is_closing:
            raise ProcessStartError(f"{spec.title}: the nodes are closed")
        placed: asyncio.Future[RemoteProcess] = asyncio.get_running_loop().create_future()
        self._waiting[spec.title] = (spec, placed)
        self._place()
        if not placed.done():
            log.warning("node.awaited", why=self.why_waiting)
            self._on_change()
        try:
            return await asyncio.wait_for(placed, self._config.timeout_s)
        except TimeoutError:
            raise ProcessStartError(f"no node had room for {spec.title} in {self._config.timeout_s:g} s") from None
        finally:
            if self._waiting.get(spec.title, (None, None))[1] is placed:
                del self._waiting[spec.title]
            self._on_change()

    def withdraw(self, child: str) -> None:
        """Let `spawn` of a child fail, if it still waits for a node."""
        _, placed = self._waiting.pop(child, (None, None))
        if placed is not None and not placed.done():
            placed.set_exception(ProcessStartError(f"{child} is not wanted any more"))

    def _place(self) -> None:
        """Give each that waits to the node that a launcher meant it for, or has the fewest, among those with room."""
        if not self._complete.is_set():
            return
        for child, (spec, placed) in list(self._waiting.items()):
            free = [(peer, node) for peer, node in self._nodes.items() if node.has_room]
            if not free:
                return
            number = self._children.index(child)
            peer, node = min(free, key=lambda entry: (entry[1].rank != number, len(entry[1].processes)))
            del self._waiting[child]
            process = RemoteProcess(child, spec.incarnation, node, partial(self._say, peer))
            node.processes[child] = process
            self._carrier.port.disconnect(child)
            # Nobody else may speak in its name, nor in that of its thread of beats; nor one that came before it.
            for name in (child, f"beat {child.rpartition(' ')[2]}"):
                self._carrier.port.expect(name, spec.incarnation)
                self._carrier.port.vouch(name, node.server_key)
            self._say(peer, StartOnNode(child, spec.incarnation, spec.arguments))
            log.info("executor.placed", child=child, incarnation=spec.incarnation, node=node.name)
            placed.set_result(process)

    # ---- messages ----

    def take(self, peer: str, message: Message) -> None:
        """Take a message of a node."""
        if isinstance(message, NodeJoined):
            self._welcome(peer, message)
            return
        node = self._nodes.get(peer)
        if node is None:
            if isinstance(message, Beat) and message.incarnation == self._dead.get(peer):
                self._say(peer, JoinAgain(message.incarnation))
            return
        if isinstance(message, StartedOnNode | ExitedOnNode):
            self._handle_process(node, message)
        elif isinstance(message, Beat | NodePrepared | NodeUnfit | NodeLeft):
            if message.incarnation != node.incarnation:
                return
            if isinstance(message, Beat):
                node.num_silent_ticks = 0
            elif isinstance(message, NodePrepared):
                node.is_prepared = True
                log.info("node.joined", node=node.name, num_nodes=self._num_prepared, awaited=self._config.num_nodes)
                if self._num_prepared >= self._config.num_nodes:
                    self._complete.set()
                self._place()
                self._on_change()
            elif isinstance(message, NodeUnfit):
                self._unfit_because = f" (unfit: {node.name}: {message.why})"
                self._lose(peer, f"is unfit: {message.why}")
            else:
                self._lose(peer, "has left")

    def _welcome(self, peer: str, joined: NodeJoined) -> None:
        try:
            split_endpoint(joined.endpoint)
            if peer in self._nodes:
                self._lose(peer, "has joined again")
            self._carrier.port.connect(
                peer, joined.incarnation, joined.endpoint, server_key=joined.server_key.encode("ascii", "replace")
            )
        except InvalidConfigError as error:
            log.error("node.refused", peer=peer, why=str(error))
            return
        if joined.world_size not in (0, self._config.num_nodes):
            log.warning(
                "nodes.other_number",
                world_size=joined.world_size,
                awaited=self._config.num_nodes,
                advice="give `octavo serve --nodes` as many as the launcher starts",
            )
        self._dead.pop(peer, None)
        self._lost_at.pop(peer, None)
        self._nodes[peer] = _Node(joined)
        self._say(peer, self._prepare)
        self._say(peer, Beat(EDGE, self._incarnation))

    def _handle_process(self, node: _Node, message: StartedOnNode | ExitedOnNode) -> None:
        process = node.processes.get(message.child)
        if process is None or process.incarnation != message.incarnation:
            return
        if isinstance(message, StartedOnNode):
            process.pid = message.pid
            return
        del node.processes[message.child]
        process.end(f"{message.why} on node {node.name}", is_innocent=message.is_innocent)
        self._place()

    def _lose(self, peer: str, why: str) -> None:
        node = self._nodes.pop(peer)
        log.error("node.lost", node=node.name, why=why, executors=list(node.processes))
        self._dead[peer] = node.incarnation
        self._lost_at[peer] = self._num_ticks
        processes = list(node.processes.values())
        node.processes.clear()
        for process in processes:
            self._carrier.port.disconnect(process.child)
            process.end(f"is lost with its node: {node.name} {why}", is_innocent=True)
        self._on_change()

    def _tick(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._num_ticks += 1
        for peer, node in list(self._nodes.items()):
            node.num_silent_ticks += 1
            if node.num_silent_ticks > MAX_SILENT_TICKS:
                self._lose(peer, f"has been silent for {MAX_SILENT_TICKS * TICK_S:.1f} s")
            elif self._num_ticks % BEAT_TICKS == 0:
                self._say(peer, Beat(EDGE, self._incarnation, progress=self._num_ticks))
        for peer, lost_at in list(self._lost_at.items()):
            if self._num_ticks - lost_at > FORGET_TICKS and self._carrier.port.forget(peer):
                del self._dead[peer], self._lost_at[peer]

    def _say(self, peer: str, message: Message) -> None:
        self._carrier.send(peer, message)
