"""Nodes placed by Ray: `python -m octavo.gateway.ray_nodes --num-nodes N --join tcp://HOST:PORT ...` (octavo[ray]).

Each node is a Ray actor that keeps an `octavo node` running on the host where Ray put it. Ray restarts the actor when
its host is lost; the node then joins the engine as any other that comes back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import structlog

from ..actors.runtime.logs import configure_logs
from ..messages.errors import InvalidConfigError, OctavoError
from .flag_parser import Parser
from .flag_values import positive
from .node_flags import add_node_flags
from .node_settings import node_settings

log = structlog.get_logger("octavo.ray")

STOP_S = 10.0


class NodeActor:
    """What Ray runs on a host.

    Args:
        command: of `python -m octavo.gateway.node`, without its name.
        number: of this node.
    """

    def __init__(self, command: list[str], number: int) -> None:
        self._command = [sys.executable, "-m", "octavo.gateway.node", *command, f"--name=ray.{number}"]
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Be a node until it ends; returns its exit status."""
        # Ray may kill its worker, and would start another beside a node that lived on.
        command = [*self._command, f"--die-with-parent={os.getpid()}"]
        self._process = subprocess.Popen(command)  # noqa: S603  # ours
        return self._process.wait()

    def stop(self) -> None:
        """Have `run` end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def main() -> None:
    """Place the nodes, and keep them until SIGTERM or SIGINT."""
    parser = Parser(prog="python -m octavo.gateway.ray_nodes")
    group = parser.add_argument_group("ray")
    group.add_argument("--num-nodes", type=positive, required=True, help="as of `octavo serve --nodes`")
    group.add_argument("--ray-address", help="of a Ray cluster; default: RAY_ADDRESS, or a Ray started here")
    group.add_argument("--num-cpus", type=positive, default=1, help="that Ray reserves for each node")
    group.add_argument(
        "--num-gpus",
        type=int,
        help="that Ray reserves for each node; it sees no others. Default: one for each of its --slots (one without) "
        "if Ray's hosts have GPUs, else 0",
    )
    group.add_argument(
        "--strategy",
        default="SPREAD",
        choices=["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"],
        help="Ray's placement of the nodes; SPREAD: on different hosts as far as there are",
    )
    add_node_flags(parser)
    arguments = parser.parse_args()
    try:
        sys.exit(place(arguments))
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        sys.exit(2)


def place(arguments: Any) -> int:
    """Place nodes as parsed flags say, and wait until they have ended.

    Raises:
        InvalidConfigError: Ray is not installed, or a flag makes no sense.
    """
    configure_logs(arguments.log_format)
    if arguments.name:
        raise InvalidConfigError("Ray's nodes are called ray.0, ray.1 and so on: leave --name out", field="name")
    node_settings(arguments)  # refused here, not on every host
    try:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    except ImportError:
        raise InvalidConfigError("Ray is not installed: pip install 'octavo[ray]'") from None
    ray.init(address=arguments.ray_address, log_to_driver=True)
    num_gpus = _num_gpus(arguments, ray.cluster_resources())
    resources = {"CPU": arguments.num_cpus} | ({"GPU": num_gpus} if num_gpus else {})
    group = placement_group([resources] * arguments.num_nodes, strategy=arguments.strategy)
    ray.get(group.ready())
    options = {"num_cpus": arguments.num_cpus, "num_gpus": num_gpus, "max_concurrency": 2}
    remote = ray.remote(NodeActor)
    actors = [
        remote.options(
            **options,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        ).remote(_node_command(arguments), number)
        for number in range(arguments.num_nodes)
    ]
    running = [actor.run.remote() for actor in actors]
    log.info("ray.nodes_placed", num_nodes=len(actors), strategy=arguments.strategy)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    try:
        while not stop.is_set() and running:
            ended, running = ray.wait(running, num_returns=1, timeout=1.0)
            for node in ended:
                if status := ray.get(node):  # refused by the engine: the log says why
                    return int(status)
    finally:
        ray.get([actor.stop.remote() for actor in actors], timeout=STOP_S)
        ray.wait(running, num_returns=len(running), timeout=STOP_S) if running else None
        ray.shutdown()
    return 0


def _num_gpus(arguments: Any, cluster: Mapping[str, float]) -> int:
    """GPUs of each node: Ray hides all others from it, and with 0 all of them."""
    if arguments.num_gpus is not None:
        return int(arguments.num_gpus)
    return int(arguments.slots or 1) if cluster.get("GPU") else 0


def _node_command(arguments: Any) -> list[str]:
    """The flags of each node, as they were given here."""
    fields = ("join", "log_format", "keys", "server_key", "address", "slots", "model", "num_threads", "cpu_affinity")
    given = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in fields}
    switches = ("plain_loopback", "offline", "trust_remote_code")
    return [f"{flag}={value}" for flag, value in given.items() if value is not None] + [
        f"--{name.replace('_', '-')}" for name in switches if getattr(arguments, name)
    ]


if __name__ == "__main__":
    main()
