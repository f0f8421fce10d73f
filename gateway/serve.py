"""`octavo serve`: an engine and a gateway, as processes of their own or, with `--in-process`, in one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import os
import socket
import time

import msgspec
import structlog

from ..actors.runtime.logs import configure_logs
from ..messages.errors import InvalidConfigError
from .accelerator import resolve_device
from .api.server import serve_http
from .api.settings import ServerSettings
from .config import EngineConfig, NodesConfig, make_config
from .engine import Engine
from .flags import engine_fields
from .generation_config import say_request_defaults
from .performance_mode import described
from .server_flags import nodes_fields, server_fields

log = structlog.get_logger("octavo")

SPARE_FILES = 256
"""File descriptors for all that is not a connection: models, logs, refused clients."""


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    configure_logs(arguments.log_format)
    # A prompt is tokenized by one thread; `tokenizers` would keep a pool of them, and warn after each fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    fields = engine_fields(arguments)
    if arguments.in_process is None:
        fields["in_process"] = not hasattr(os, "fork")
    if arguments.gateways > 1 and arguments.journal is not None:
        raise InvalidConfigError(
            "the journal of open streams is of one gateway: leave --gateways or --journal out", field="gateways"
        )
    if arguments.gateways > 1 and fields["in_process"]:
        raise InvalidConfigError("several gateways are several processes: leave --in-process out", field="in_process")
    config = make_config({**fields, "served_model_names": tuple(arguments.served_model_name)})
    nodes = nodes_fields(arguments)
    check_address(arguments.host, arguments.port, is_shared=arguments.gateways > 1)
    return asyncio.run(_serve(config, arguments, None if nodes is None else NodesConfig(**nodes)))


async def _serve(config: EngineConfig, arguments: argparse.Namespace, nodes: NodesConfig | None) -> int:
    started = time.monotonic()
    async with Engine(
        config=config, log_format=arguments.log_format, num_edges=arguments.gateways, nodes=nodes
    ) as engine:
        # What is alive now lives as long as the process: keep full collections from walking it.
        gc.collect()
        gc.freeze()
        names = config.served_model_names or (engine.model_name,)
        fields = server_fields(arguments)
        fields["max_connections"] = connections_within_files(fields["max_connections"])
        settings = ServerSettings(served_model_names=names, **fields)
        log.info("server.settings", **described(msgspec.structs.asdict(config), resolve_device(config.device)))
        say_request_defaults(engine.request_defaults)
        stop, abort = asyncio.Event(), asyncio.Event()
        reporting = asyncio.create_task(report_throughput(engine, arguments.log_interval))
        beside: list[asyncio.Task[None]] = []

        def on_listening(port: int) -> None:
            greet(engine, names[0], arguments, port, time.monotonic() - started)
            if arguments.gateways > 1:
                beside.append(asyncio.create_task(engine.serve_beside(settings, arguments.host, port, stop, abort)))
                beside[0].add_done_callback(lambda _: stop.set())  # without the others there is no such server

        try:
            await serve_http(
                engine,
                settings,
                arguments.host,
                arguments.port,
                stop=stop,
                abort=abort,
                on_listening=on_listening,
                is_port_shared=arguments.gateways > 1,
            )
        finally:
            stop.set()
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
            await asyncio.gather(*beside)
    return 0


def check_address(host: str, port: int, *, is_shared: bool = False) -> None:
    """Find out whether the address can be listened on before a model is loaded for it, which takes a while.

    Args:
        is_shared: by several processes of the same server.

    Raises:
        OSError: it cannot; the message says what to change.
    """
    try:
        places = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in places:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if is_shared and hasattr(socket, "SO_REUSEPORT"):
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        advice = _ADDRESS_ADVICE.get(error.errno or 0, "try another --host or --port")
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}. {advice}") from None


_ADDRESS_ADVICE = {
    errno.EADDRINUSE: "Something listens there already: stop it, or choose another --port (0: any free one)",
    errno.EADDRNOTAVAIL: "This machine does not have that address: give one that it has as --host, or 0.0.0.0 for all",
    errno.EACCES: "Ports below 1024 are for privileged users: choose another --port",
}


def connections_within_files(asked: int) -> int:
    """Let the process open as many files as it may, and bound its connections to fewer than that.

    A server that runs out of file descriptors cannot even refuse a connection.
    """
    try:
        import resource
    except ImportError:  # no such limits on this system
        return asked
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = asked + SPARE_FILES if hard == resource.RLIM_INFINITY else hard
        if wanted > soft:
            with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit that they do not tell
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = max(soft - SPARE_FILES, 1)
    if soft == resource.RLIM_INFINITY or 0 < asked <= possible:
        return asked
    if asked:
        log.warning("server.few_files", max_connections=possible, advice=f"ulimit -n {asked + SPARE_FILES}")
    return possible


def greet(engine: Engine, name: str, arguments: argparse.Namespace, port: int, seconds: float) -> None:
    """One block that says what is served, with which memory, and how to try it."""
    host = "127.0.0.1" if arguments.host in ("0.0.0.0", "::") else arguments.host  # noqa: S104  # a comparison, not a bind
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and not arguments.api_key:
        log.warning("server.open", host=arguments.host, advice="anyone who reaches this address may use it: --api-key")
    asked = engine.config.max_model_len
    if asked is not None and asked > engine.max_model_len:
        log.warning(
            "server.context_is_shorter", asked=asked, max_model_len=engine.max_model_len, reason="the model's own limit"
        )
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    log.info(
        "server.ready",
        url=url,
        model=name,
        seconds=round(seconds, 2),
        max_model_len=engine.max_model_len,
        kv_blocks=engine.num_blocks,
        kv_cache_mib=engine.kv_cache_bytes // 2**20,
        playground=f"{url}/",
    )


async def report_throughput(engine: Engine, interval_s: float) -> None:
    """Log a line of throughput every `interval_s` while there is something to say; 0: never."""
    if not interval_s:
        return
    before = engine.stats()
    while True:
        await asyncio.sleep(interval_s)
        now = engine.stats()
        if now.num_steps != before.num_steps or now.num_live:
            queries = now.prefix_cache_queries - before.prefix_cache_queries
            hits = now.prefix_cache_hits - before.prefix_cache_hits
            log.info(
                "throughput",
                prompt_tokens_per_s=round((now.prompt_tokens - before.prompt_tokens) / interval_s, 1),
                generation_tokens_per_s=round((now.generation_tokens - before.generation_tokens) / interval_s, 1),
                running=now.num_running,
                waiting=now.num_waiting,
                kv_usage_percent=round(100 * now.kv_cache_usage, 1),
                prefix_hit_percent=round(100 * hits / queries, 1) if queries else 0.0,
            )
        before = now
