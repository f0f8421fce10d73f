"""A node: a host that starts executors when edge 0 of an engine elsewhere says so.

Also `python -m octavo.gateway.node`, for torchrun.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import structlog

from ..actors.executor.cpu_topology import cpu_quota, read_cpus
from ..actors.runtime.addresses import TcpSettings, address_towards
from ..actors.runtime.logs import configure_logs
from ..actors.runtime.parent_death import die_with_parent
from ..actors.runtime.process_title import set_title
from ..actors.runtime.processes import Nursery
from ..actors.runtime.run_dir import RunDir
from ..messages.errors import OctavoError
from .flag_parser import Parser
from .node_flags import add_node_flags
from .node_membership import Membership
from .node_settings import NodeSettings, node_settings
from .processes.replica import EXECUTOR_MODULE, preload_module

log = structlog.get_logger("octavo.node")

REJOIN_S = 1.0
ALLOW_LIST = "allowed"
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
"""What torchrun tells its processes, and torch in an executor would take to be about itself."""


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
    nursery = Nursery((preload_module("auto"), EXECUTOR_MODULE))
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
