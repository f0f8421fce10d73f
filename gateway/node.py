"""A node: a host that starts executors when edge 0 of an engine elsewhere says so.

Also `python -m octavo.gateway.node`, for torchrun.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog

from ..actors.executor.config import ExecutorProcessSpec
from ..actors.executor.cpu_topology import cpu_quota, read_cpus
from ..actors.runtime.addresses import EDGE, TcpSettings, address_towards, in_brackets, split_endpoint
from ..actors.runtime.asyncio_port import AsyncioPort
from ..actors.runtime.curve import CurveKeys, check_public_key
from ..actors.runtime.logs import configure_logs
from ..actors.runtime.parent_death import die_with_parent
from ..actors.runtime.port import LinkEvent, Port
from ..actors.runtime.port_record import drops_of
from ..actors.runtime.process_title import set_title
from ..actors.runtime.processes import ChildProcess, Nursery, ProcessSpec, ProcessStartError
from ..actors.runtime.run_dir import RunDir
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
from .flag_parser import Parser
from .node_flags import add_node_flags
from .processes.checkpoint_digest import checkpoint_digest
from .processes.replica import EXECUTOR_MODULE, PRELOAD_MODULE

log = structlog.get_logger("octavo.node")

BEAT_S = 0.25
MAX_SILENCE_TICKS = 40
"""Beats of our own without one of edge 0, after which it counts as gone. More patient than edge 0 is with us: it may
only stand still, and if it has given us up, it says so once it hears us again."""

REJOIN_S = 1.0
_REMIND_TICKS = 40
_FATAL = ("version", "schema", "unknown", "key", "name")
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
"""What torchrun tells its processes, and torch in an executor would take to be about itself."""

DEFAULT_PORT = 7000
ALLOW_LIST = "allowed"
_CHILD = re.compile(r"executor \d{1,6}")
_REPLACED_BY = re.compile(r"was replaced by (\d{1,18})$")
"""How a port refuses an incarnation that it takes for an old one."""

End = Literal["again", "stopped", "unfit"]


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a node joins, and with what.

    Attributes:
        join: where edge 0 listens.
        name: of the node.
        address: of this host, for the others; empty: that of the interface that leads to edge 0.
        keys: key file; empty: plain loopback.
        server_key: public key of the engine's host.
        num_slots: executors at most; 0 for any number.
        model: here; None: what the engine was given.
        offline, trust_remote_code: as of an engine.
        num_threads, cpu_affinity: of executors; None: what the engine was given.
        log_format: of the processes.
        rank, world_size: among the nodes that a launcher starts; -1 and 0 without one.
        first_gpu: of its executors'; others of this host's are other nodes'.
    """

    join: str
    name: str
    address: str = ""
    keys: str = ""
    server_key: str = ""
    num_slots: int = 0
    model: str | None = None
    offline: bool = False
    trust_remote_code: bool = False
    num_threads: int | None = None
    cpu_affinity: str | None = None
    log_format: str = "auto"
    rank: int = -1
    world_size: int = 0
    first_gpu: int = 0


class NodeRefusedError(OctavoError):
    """The engine does not take this node."""

    code = "node_refused"


def run_node(arguments: argparse.Namespace) -> int:
    """Serve an engine elsewhere until SIGTERM or SIGINT; `arguments` are those of `add_node_flags`."""
    if arguments.die_with_parent is not None:
        die_with_parent(arguments.die_with_parent)
    configure_logs(arguments.log_format)
    settings = node_settings(arguments)
    _forget_launcher()
    set_title(f"node {settings.name}")
    with RunDir() as run_dir:
        if settings.keys:  # nobody but the engine's host speaks to this host's executors
            (run_dir.path / ALLOW_LIST).write_text(f"{settings.server_key}\n", encoding="ascii")
        return asyncio.run(_serve(settings, run_dir.path))


def _forget_launcher() -> None:
    """Take out of the environment what torchrun tells of itself.

    Where it starts several processes on a host, and nobody says how many threads each is to have, it says one. That is
    no wish of anybody's, and a CPU's executor would be slow: each gets its share of the cores.
    """
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_here > 1 and os.environ.get("OMP_NUM_THREADS") == "1" and hasattr(os, "sched_getaffinity"):
        num_cores = min(len({cpu.core for cpu in read_cpus(os.sched_getaffinity(0))}), cpu_quota())
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(num_cores // num_here)))
    for name in _LAUNCHERS:
        os.environ.pop(name, None)


def node_settings(arguments: argparse.Namespace) -> NodeSettings:
    """Settings of parsed flags and of torchrun's environment.

    Raises:
        InvalidConfigError: what is missing, or makes no sense.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, which starts a process for each rank
    join = arguments.join
    if join is None and is_launched:
        join = f"tcp://{in_brackets(os.environ['MASTER_ADDR'])}:{DEFAULT_PORT}"
    if join is None:
        raise InvalidConfigError("--join tcp://HOST:PORT says where the engine listens", field="join")
    split_endpoint(join)
    server_key = _read_public_key(arguments.server_key) if arguments.server_key else ""
    if bool(arguments.keys) != bool(server_key):
        raise InvalidConfigError(
            "--keys FILE (this host's) and --server-key KEY (the engine's) go together", field="server_key"
        )
    if not arguments.keys and not arguments.plain_loopback:
        raise InvalidConfigError(
            "links between hosts need keys: --keys FILE (`octavo keys FILE` makes one) and --server-key KEY; on a "
            "loopback address, --plain-loopback does without",
            field="keys",
        )
    name, num_slots = arguments.name or platform.node(), arguments.slots or 0
    if is_launched:
        name += f".{os.environ['RANK']}"
        num_slots = arguments.slots or 1
    if not name.isprintable() or not 0 < len(name) <= 56:
        raise InvalidConfigError(f"the name {name!r} must have 1 to 56 printable characters", field="name")
    return NodeSettings(
        join=join,
        name=name,
        address=arguments.address or "",
        keys=arguments.keys or "",
        server_key=server_key,
        num_slots=num_slots,
        model=arguments.model,
        offline=arguments.offline,
        trust_remote_code=arguments.trust_remote_code,
        num_threads=arguments.num_threads,
        cpu_affinity=arguments.cpu_affinity,
        log_format=arguments.log_format,
        rank=int(os.environ["RANK"]) if is_launched else -1,
        world_size=int(os.environ["WORLD_SIZE"]) if is_launched else 0,
        first_gpu=int(os.environ.get("LOCAL_RANK", "0")) * num_slots if is_launched else 0,
    )


async def _find_address(settings: NodeSettings, stop: asyncio.Event) -> NodeSettings:
    """Settings with this host's address; waits while the engine's name is not known yet."""
    while not settings.address and not stop.is_set():
        try:
            address = await asyncio.to_thread(address_towards, settings.join)
        except OSError as error:
            log.warning("node.waits", join=settings.join, why=str(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), REJOIN_S)
        else:
            return msgspec.structs.replace(settings, address=address)
    return settings


def _read_public_key(given: str) -> str:
    """A public key, or that of the file at a path: the key alone, or the first of an allow-list or key file."""
    path = Path(given)
    if len(given) != 40 or path.is_file():
        try:
            words = path.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfigError(f"--server-key {given}: neither a public key nor a file: {error}") from error
        given = next((word for word in words if len(word) == 40), "")
    return check_public_key(given)


async def _serve(settings: NodeSettings, folder: Path) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    settings = await _find_address(settings, stop)
    if stop.is_set():
        return 0
    allow_list = str(folder / ALLOW_LIST) if settings.keys else ""
    tcp = TcpSettings(host=settings.address, keys=settings.keys, allow_list=allow_list)
    keys = tcp.read_keys()
    nursery = Nursery((PRELOAD_MODULE, EXECUTOR_MODULE))
    incarnation = least_next = 0
    try:
        await nursery.start()
        while True:
            # Of a node that was started anew, too, the later incarnation counts, be it that the clock was set back.
            incarnation = max(incarnation + 1, time.time_ns() // 1_000_000, least_next)
            membership = Membership(settings, tcp, keys, nursery, incarnation=incarnation, run_dir=str(folder))
            end = await membership.last(stop)
            least_next = membership.least_next
            if end == "stopped":
                return 0
            if end == "unfit":
                raise NodeRefusedError(membership.why)
            log.warning("node.joins_again", why=membership.why)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), REJOIN_S)
    finally:
        await nursery.close()


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


def main() -> None:
    """Be a node; for torchrun, which starts Python modules."""
    parser = Parser(prog="python -m octavo.gateway.node")
    add_node_flags(parser)
    try:
        sys.exit(run_node(parser.parse_args()))
    except OctavoError as error:
        print(f"octavo node: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
