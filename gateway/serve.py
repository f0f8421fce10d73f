"""`octavo serve`: an engine and a gateway in one process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import time

import msgspec
import structlog

from ..actors.runtime.logs import configure_logs
from ..messages.errors import InvalidConfigError
from .accelerator import resolve_device
from .config import EngineConfig, NodesConfig, make_config
from .engine import Engine
from .flags import engine_fields, nodes_fields, server_fields
from .performance_mode import described
from .server import serve_http
from .settings import ServerSettings

log = structlog.get_logger("octavo")

SPARE_FILES = 256
"""File descriptors for all that is not a connection: models, logs, refused clients."""


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    configure_logs(arguments.log_format)
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
        stop, abort = asyncio.Event(), asyncio.Event()
        reporting = asyncio.create_task(report_throughput(engine, arguments.log_interval))
        beside: list[asyncio.Task[None]] = []

        def on_listening(port: int) -> None:
            _greet(engine, names[0], arguments, port, time.monotonic() - started)
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


def _greet(engine: Engine, name: str, arguments: argparse.Namespace, port: int, seconds: float) -> None:
    """One block that says what is served, with which memory, and how to try it."""
    host = "127.0.0.1" if arguments.host in ("0.0.0.0", "::") else arguments.host  # noqa: S104  # a comparison, not a bind
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and not arguments.api_key:
        log.warning("server.open", host=arguments.host, advice="anyone who reaches this address may use it: --api-key")
    url = f"http://{host}:{port}"
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
    """Log a line of throughput every `interval_s` while there is something to say."""
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
