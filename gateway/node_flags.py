"""Flags of whoever joins an engine as a node: `octavo node`, torchrun's processes, Ray's actors."""

from __future__ import annotations

import argparse

from .flag_values import number


def add_node_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that become a `NodeSettings`."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--join",
        metavar="tcp://HOST:PORT",
        help="what the engine was given as --listen; default under torchrun: port 7000 of MASTER_ADDR",
    )
    group.add_argument("--keys", metavar="FILE", help="this host's CURVE keys, made by `octavo keys FILE`")
    group.add_argument("--server-key", metavar="KEY", help="public key of the engine's host, or a file that holds it")
    group.add_argument("--plain-loopback", action="store_true", help="join on a loopback address without keys")
    group = parser.add_argument_group("node")
    group.add_argument("--name", help="of this node, unique; default: the host's name (and torchrun's local rank)")
    group.add_argument(
        "--address", help="of this host, for the others; default: that of the interface that leads to the engine"
    )
    group.add_argument("--slots", type=number, help="executors at most; default: any number, under torchrun one")
    group.add_argument(
        "--die-with-parent",
        type=number,
        metavar="PID",
        help="be killed when this process dies, which must be the one that started the node; for launchers",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="folder, GGUF file or hub name here; default: what the engine was given")
    group.add_argument("--offline", action="store_true", help="never contact the hub (HF_HUB_OFFLINE works too)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")
    group.add_argument("--num-threads", type=number, help="of each executor; default: what the engine was given")
    group.add_argument("--cpu-affinity", metavar="CORES", help="as of `octavo serve`; default: what it was given")
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-format", choices=["auto", "human", "json"], default="auto", help="auto: human on a terminal"
    )
