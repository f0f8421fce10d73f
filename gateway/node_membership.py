"""A node's time with one run of edge 0: it starts the executors that edge 0 asks for, and tells how they end."""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
from collections.abc import Coroutine
from typing import Any, Literal

import msgspec
import structlog

from ..actors.executor.config import ExecutorProcessSpec
from ..actors.runtime.addresses import EDGE, TcpSettings
from ..actors.runtime.asyncio_port import AsyncioPort
from ..actors.runtime.curve import CurveKeys
from ..actors.runtime.port import LinkEvent, Port
from ..actors.runtime.port_record import drops_of
from ..actors.runtime.processes import ChildProcess, Nursery, ProcessSpec, ProcessStartError
from ..messages.base import Message
from ..messages.errors import InvalidConfigError, OctavoError
from ..messages.nodes import (
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
from ..messages.system import Beat
from .node_settings import NodeSettings
from .processes.checkpoint_digest import checkpoint_digest
from .processes.replica import EXECUTOR_MODULE

log = structlog.get_logger("octavo.node")

BEAT_S = 0.25
MAX_SILENCE_TICKS = 40
"""Beats of our own without one of edge 0, after which it counts as gone. More patient than edge 0 is with us: it may
only stand still, and if it has given us up, it says so once it hears us again."""

_REMIND_TICKS = 40
_FATAL = ("version", "schema", "unknown", "key", "name")
_CHILD = re.compile(r"executor \d{1,6}")
_REPLACED_BY = re.compile(r"was replaced by (\d{1,18})$")
"""How a port refuses an incarnation that it takes for an old one."""

End = Literal["again", "stopped", "unfit"]


class Membership:
    """A node's time with one run of edge 0: from joining until they lose each other.

    Args:
        tcp, keys: of this host.
        nursery: that executors are forked by.
        incarnation: of the node.
        run_dir: for what executors keep.

    Attributes:
        why: it ended.
        least_next: incarnation with which the node may join again; 0: any later one.
    """

    def __init__(
        self,
        settings: NodeSettings,
        tcp: TcpSettings,
        keys: CurveKeys | None,
        nursery: Nursery,
        *,
        incarnation: int,
        run_dir: str,
    ) -> None:
        self.why = ""
        self.least_next = 0
        self._settings = settings
        self._tcp = tcp
        self._nursery = nursery
        self._incarnation = incarnation
        self._run_dir = run_dir
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[End] = self._loop.create_future()
        self._children: dict[str, ChildProcess] = {}
        self._doomed: dict[str, int] = {}
        self._gpus: dict[str, int] = {}  # that executors were given, if there are as many
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._model_path = ""
        self._edge_incarnation = 0
        self._num_silent_ticks = 0
        self._num_ticks = 0
        peer = f"node {settings.name}"
        self._port = Port(
            peer,
            incarnation,
            keys=keys,
            allowed={EDGE: (PrepareNode, StartOnNode, KillOnNode, JoinAgain, Beat)},
            allow_plain_loopback=keys is None,
        )
        endpoint = self._port.bind(tcp.endpoint)
        self._port.connect(EDGE, 0, settings.join, server_key=settings.server_key.encode())
        self._carrier = AsyncioPort(
            *(self._loop, self._port, self._take, self._on_link),
            on_failure=lambda error: self._end("again", f"a message could not be taken: {type(error).__name__}"),
        )
        self._send(
            NodeJoined(
                settings.name,
                incarnation,
                endpoint,
                keys.public if keys else "",
                settings.num_slots,
                settings.rank,
                settings.world_size,
            )
        )
        log.info("node.joins", join=settings.join, name=settings.name, address=settings.address)
        self._ticker = self._loop.call_later(BEAT_S, self._tick)

    async def last(self, stop: asyncio.Event) -> End:
        """Serve until it ends, or `stop` is set; none of the executors is left then."""
        stopped = asyncio.create_task(stop.wait())
        ending: list[asyncio.Future[Any]] = [self._ended, stopped]
        await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        end: End = self._ended.result() if self._ended.done() else "stopped"
        stopped.cancel()
        self._end("stopped", "it was told to stop")
        self._ticker.cancel()
        if end == "stopped":
            self._send(NodeLeft(self._incarnation))
        for child in self._children.values():
            child.kill()
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        if end != "again":
            await asyncio.sleep(BEAT_S)  # for the last words to leave
        self._carrier.close()
        self._port.close()
        return end

    def _end(self, end: End, why: str) -> None:
        if not self._ended.done():
            self.why = why
            self._ended.set_result(end)

    def _send(self, message: Message) -> None:
        self._carrier.send(EDGE, message)

    # ---- what edge 0 says ----

    def _take(self, messages: list[tuple[str, Message]]) -> None:
        self._num_silent_ticks = 0
        for _, message in messages:
            if self._ended.done():
                return
            if isinstance(message, Beat):
                self._edge_incarnation = message.incarnation
            elif isinstance(message, PrepareNode):
                self._run(self._find_model(message))
            elif isinstance(message, StartOnNode):
                self._start(message)
            elif isinstance(message, KillOnNode):
                self._kill(message)
            elif isinstance(message, JoinAgain) and message.incarnation == self._incarnation:
                self._end("again", "the engine took this node for dead")

    def _on_link(self, event: LinkEvent) -> None:
        if event.what == "refused":
            code = event.why.partition(":")[0]
            announced = _REPLACED_BY.search(event.why) if code == "stale" and not self._edge_incarnation else None
            if announced is not None:
                self.least_next = int(announced[1]) + 1
                self._end("again", f"{self._settings.join} knows a later start of this node: {event.why}")
            elif code == "stale":
                self._end("unfit", f"another node joined as {self._settings.name}: give each a --name of its own")
            self._end("unfit" if code in _FATAL else "again", f"{self._settings.join} refuses: {event.why}")
        elif event.what == "keys":
            # ZeroMQ gives up a connection whose key was refused; the list may be amended.
            self._end("again", f"{self._settings.join}: {event.why}")
        elif event.what in ("overrun", "malformed", "gap"):
            log.warning("link", peer=event.peer, what=event.what, why=event.why)

    async def _find_model(self, wanted: PrepareNode) -> None:
        from ..actors.executor.locate import locate_model

        settings = self._settings
        model = settings.model if settings.model is not None else wanted.model
        try:
            folder, _ = await asyncio.to_thread(
                locate_model,
                model,
                revision=wanted.revision,
                offline=settings.offline,
                trust_remote_code=settings.trust_remote_code,
            )
            digest = await asyncio.to_thread(checkpoint_digest, folder)
        except (OctavoError, OSError) as error:
            self._be_unfit(f"{model or 'the shipped model'} cannot be found: {error}")
            return
        if digest != wanted.digest:
            self._be_unfit(
                f"the checkpoint at {folder} is not the engine's: its configuration or weights differ. Give the same "
                "one with --model"
            )
            return
        self._model_path = str(folder)
        self._send(NodePrepared(self._incarnation))
        log.info("node.joined", join=settings.join, model=str(folder))

    def _be_unfit(self, why: str) -> None:
        self._send(NodeUnfit(self._incarnation, why))
        self._end("unfit", why)

    # ---- processes ----

    def _start(self, start: StartOnNode) -> None:
        try:
            spec = self._process_spec(start)
        except (InvalidConfigError, msgspec.MsgspecError) as error:
            self._send(ExitedOnNode(start.child, start.incarnation, f"is not described: {error}", is_innocent=True))
        else:
            self._run(self._spawn(start, spec))

    def _process_spec(self, start: StartOnNode) -> ProcessSpec:
        """What edge 0 wants, with what this host alone knows."""
        if not _CHILD.fullmatch(start.child):
            raise InvalidConfigError(f"a node starts executors, not {start.child!r}")
        settings = self._settings
        wanted = msgspec.msgpack.decode(start.spec, type=ExecutorProcessSpec)
        config = msgspec.structs.replace(
            wanted.config,
            model_path=self._model_path,
            trust_remote_code=settings.trust_remote_code,
            num_threads=settings.num_threads or wanted.config.num_threads,
            cpu_affinity=settings.cpu_affinity or wanted.config.cpu_affinity,
            gpu=self._gpu_for(start.child),
        )
        here = {
            "run_dir": self._run_dir,
            "log_format": settings.log_format,
            "tcp": self._tcp,
            "edge_endpoint": settings.join,
            "edge_key": settings.server_key,
            "address": settings.address,
        }
        spec = msgspec.structs.replace(wanted, child=start.child, incarnation=start.incarnation, config=config, **here)
        return ProcessSpec(
            title=start.child,
            target=f"{EXECUTOR_MODULE}:run",
            arguments=msgspec.msgpack.encode(spec),
            incarnation=start.incarnation,
        )

    def _gpu_for(self, child: str) -> int:
        """The first GPU that no other executor of this node was given."""
        others = [gpu for name, gpu in self._gpus.items() if name != child]
        self._gpus[child] = next(gpu for gpu in itertools.count(self._settings.first_gpu) if gpu not in others)
        return self._gpus[child]

    async def _spawn(self, start: StartOnNode, spec: ProcessSpec) -> None:
        try:
            process = await self._nursery.spawn(spec)
        except ProcessStartError as error:
            log.error("process.not_started", child=start.child, incarnation=start.incarnation, why=str(error))
            self._gpus.pop(start.child, None)
            self._send(ExitedOnNode(start.child, start.incarnation, str(error), is_innocent=True))
            return
        self._children[start.child] = process
        if self._ended.done() or self._doomed.pop(start.child, 0) == start.incarnation:
            process.kill()
        log.info("process.started", child=start.child, incarnation=start.incarnation, pid=process.pid)
        self._send(StartedOnNode(start.child, start.incarnation, process.pid))
        ended = await process.wait()
        if self._children.get(start.child) is process:
            del self._children[start.child]
            self._gpus.pop(start.child, None)
        log.info("process.exited", child=start.child, incarnation=start.incarnation, why=ended.why)
        self._send(ExitedOnNode(start.child, start.incarnation, ended.why, ended.is_innocent))

    def _kill(self, kill: KillOnNode) -> None:
        process = self._children.get(kill.child)
        if process is not None and process.incarnation == kill.incarnation:
            process.kill(kill.signum if kill.signum in (signal.SIGTERM, signal.SIGSTOP) else signal.SIGKILL)
        else:
            self._doomed[kill.child] = kill.incarnation

    # ---- time ----

    def _run(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("node.failed", exc_info=error)
            self._be_unfit(f"{type(error).__name__}: {error}")

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(BEAT_S, self._tick)
        self._num_ticks += 1
        if self._edge_incarnation:
            beat = Beat(
                f"node {self._settings.name}",
                self._incarnation,
                progress=self._num_ticks,
                messages_dropped=drops_of(self._port.counters),
            )
            self._send(beat)
            self._num_silent_ticks += 1
            if self._num_silent_ticks > MAX_SILENCE_TICKS:
                self._end("again", f"nothing was heard of the engine for {MAX_SILENCE_TICKS * BEAT_S:.1f} s")
        elif self._num_ticks % _REMIND_TICKS == 0:
            log.warning(
                "node.waits",
                join=self._settings.join,
                advice="nobody lets us in: is the engine there, is --server-key its key, has its --allow-list ours?",
            )
