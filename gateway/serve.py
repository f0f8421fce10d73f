"""`octavo serve`: an engine and a gateway in one process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import time

import structlog

from .config import EngineConfig, make_config
from .engine import Engine
from .flags import engine_fields
from .logs import configure_logs
from .server import serve_http
from .settings import ServerSettings

log = structlog.get_logger("octavo")


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    configure_logs(arguments.log_format)
    fields = engine_fields(arguments)
    config = make_config({**fields, "served_model_names": tuple(arguments.served_model_name)})
    return asyncio.run(_serve(config, arguments))


async def _serve(config: EngineConfig, arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    async with Engine(config=config) as engine:
        # What is alive now lives as long as the process: keep full collections from walking it.
        gc.collect()
        gc.freeze()
        names = config.served_model_names or (engine.model_name,)
        settings = ServerSettings(
            served_model_names=names,
            api_keys=tuple(arguments.api_key),
            allowed_origins=tuple(arguments.allowed_origins),
            shutdown_timeout_s=arguments.shutdown_timeout,
        )
        reporter = asyncio.create_task(report_throughput(engine, arguments.log_interval))
        try:
            await serve_http(
                engine,
                settings,
                arguments.host,
                arguments.port,
                on_listening=lambda port: _greet(engine, names[0], arguments, port, time.monotonic() - started),
            )
        finally:
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)
    return 0


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
