"""Command-line flags of `octavo serve` alone: its HTTP side, and the other hosts that lend it executors."""

from __future__ import annotations

import argparse
from typing import Any

from ..messages.errors import InvalidConfigError
from .durations import duration
from .flag_values import host_name, network, number, origin, port, positive, seconds, secret


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo serve` alone; `server_fields` reads most of them."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every interface")
    group.add_argument("--port", type=port, default=8000, help="port to listen on; 0: any free one")
    group.add_argument(
        "--gateways", type=positive, default=1, metavar="N", help="processes that serve HTTP, on the same port"
    )
    group.add_argument("--served-model-name", nargs="+", default=[], help="names that clients may use")
    group.add_argument(
        "--api-key", action="append", type=secret, default=[], help="key that clients must send; may be repeated"
    )
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        metavar="ORIGIN",
        type=origin,
        default=[],
        help="origins of web pages that may call the server, such as http://localhost:3000; * for any",
    )
    group.add_argument(
        "--allowed-hosts",
        nargs="+",
        metavar="NAME",
        type=host_name,
        default=[],
        help="names by which clients may call the server, beside localhost and any address; * for any name. Without "
        "this flag: localhost alone if it listens on a loopback address without --api-key, otherwise any name",
    )
    group.add_argument(
        "--max-connections", type=number, default=16384, help="open at a time, then 503; 0: no bound but the system's"
    )
    group.add_argument(
        "--max-connections-per-client",
        type=number,
        default=4096,
        help="open at a time from one address (IPv6: one /64 network), then 429; 0: no bound",
    )
    group.add_argument(
        "--trusted-proxies",
        nargs="+",
        metavar="ADDRESS",
        type=network,
        default=[],
        help="addresses or networks of proxies, to which the bound for one client does not apply",
    )
    group.add_argument(
        "--shutdown-timeout",
        "--drain-timeout",
        type=seconds,
        default=30.0,
        help="seconds that SIGTERM waits for open answers",
    )
    group.add_argument(
        "--request-timeout",
        type=duration,
        metavar="TIME",
        help="an answer that takes longer from its request's arrival on, waiting included, ends with what it has, as "
        "`abort`; without this flag: no limit",
    )
    group.add_argument(
        "--max-queue-wait",
        metavar="SECONDS",
        type=seconds,
        default=5.0,
        help="while those who wait would take longer, by the speed of late, more are refused with 429; 0: no bound",
    )
    group.add_argument(
        "--enable-fault-injection",
        action="store_true",
        help="let clients make actors fail (POST /debug/crash), for `octavo chaos`; never on a public address",
    )


def add_nodes_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo serve` that become a `NodesConfig`."""
    group = parser.add_argument_group("other hosts")
    group.add_argument(
        "--listen",
        metavar="tcp://HOST:PORT",
        help="where `octavo node --join` of other hosts finds this one; 0.0.0.0 for every interface",
    )
    group.add_argument(
        "--nodes", type=positive, metavar="N", help="with --listen: nodes to wait for before loading; default: 1"
    )
    group.add_argument("--keys", metavar="FILE", help="this host's CURVE keys, made by `octavo keys FILE`")
    group.add_argument("--allow-list", metavar="FILE", help="public keys of nodes that may join, one a line")
    group.add_argument(
        "--plain-loopback", action="store_true", help="let --listen on a loopback address do without keys"
    )
    group.add_argument(
        "--local-executors",
        type=number,
        metavar="N",
        help="executors that run on this host, the others on nodes; default: an even share, rounded down",
    )
    group.add_argument(
        "--node-timeout", type=seconds, default=600.0, metavar="SECONDS", help="that executors may wait for a node"
    )


def nodes_fields(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Fields of `NodesConfig` from parsed flags; None without `--listen`."""
    if arguments.listen is None:
        for flag in ("nodes", "keys", "allow_list", "plain_loopback", "local_executors"):
            if getattr(arguments, flag):
                raise InvalidConfigError(
                    f"--{flag.replace('_', '-')} is about nodes, which join at an address: --listen tcp://HOST:PORT",
                    field=flag,
                )
        return None
    return {
        "listen": arguments.listen,
        "num_nodes": arguments.nodes or 1,
        "keys": arguments.keys or "",
        "allow_list": arguments.allow_list or "",
        "plain_loopback": arguments.plain_loopback,
        "local_executors": arguments.local_executors,
        "timeout_s": arguments.node_timeout,
    }


def server_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `ServerSettings` from parsed flags."""
    return {
        "api_keys": tuple(arguments.api_key),
        "allowed_origins": tuple(arguments.allowed_origins),
        "allowed_hosts": tuple(arguments.allowed_hosts),
        "max_connections": arguments.max_connections,
        "max_connections_per_client": arguments.max_connections_per_client,
        "trusted_proxies": tuple(arguments.trusted_proxies),
        "shutdown_timeout_s": arguments.shutdown_timeout,
        "request_timeout_s": arguments.request_timeout,
        "max_queue_wait_s": arguments.max_queue_wait,
        "enable_fault_injection": arguments.enable_fault_injection,
        "stream_journal": arguments.journal or "",
    }
