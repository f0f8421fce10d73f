"""What every route of one server shares."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from ...messages.samples import SampleFamily
from .connections import ConnectionTable
from .engine_protocol import EngineLike
from .http_errors import ApiError
from .memory_limit import MemoryLimit, MemoryWatch
from .metrics import GatewayMetrics
from .overload import AdmissionCore, OverloadLimits
from .readiness import ReadinessConfig, ReadinessCore
from .service_account import ServiceAccount
from .settings import ServerSettings
from .sse import StreamPump
from .telemetry import CURRENT, Tracing

if TYPE_CHECKING:
    from ..stats import EngineStats
    from .exchange import Exchange

log = structlog.get_logger("octavo.http")


class GatewayContext:
    """The engine, how to serve it, and what is counted on the way.

    Attributes:
        model_names: what clients may call the model; the first is what answers say.
        is_draining: new work is refused, open responses go on.
    """

    def __init__(self, engine: EngineLike, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.model_names = settings.served_model_names or engine.config.served_model_names or (engine.model_name,)
        self.pump = StreamPump(buffer_bytes=settings.stream_buffer_bytes, stall_s=settings.stream_stall_s)
        self.connections = ConnectionTable(
            max_total=settings.max_connections,
            max_per_client=settings.max_connections_per_client,
            trusted_proxies=settings.trusted_proxies,
        )
        self.metrics = GatewayMetrics(
            engine, self.model_names[0], self.pump, self.connections, lambda: self.admission.num_refused
        )
        config = engine.config
        memory_limit = MemoryLimit()
        self.admission = AdmissionCore(
            OverloadLimits(
                max_requests=config.max_num_seqs + config.max_num_queued_requests,
                max_bytes=settings.max_open_bytes,
                max_wait_ns=int(settings.max_queue_wait_s * 1e9),
                min_waiting=config.max_num_seqs,
                min_waiting_overloaded=max(1, config.max_num_seqs // 8),
                max_running=config.max_num_seqs * config.data_parallel_size,
            ),
            engine.stats,
            MemoryWatch(lambda: memory_limit.share).is_full,
        )
        self._readiness = ReadinessCore(
            ReadinessConfig(grace_ns=int(settings.ready_grace_s * 1e9), stall_ns=int(settings.stall_s * 1e9))
        )
        # Engines beside which no other edge serves need not have one.
        self._service: ServiceAccount | None = getattr(engine, "service_account", None)
        if self._service is not None:
            self._service.attach(self)
        self.tracing = Tracing.from_environment(self.model_names[0])
        self.is_draining = False
        self._num_refusals = 0  # since the last line about them
        self._refusals_logged_ns = -1_000_000_000
        self._open: dict[Exchange, None] = {}
        self._none_open = asyncio.Event()
        self._none_open.set()

    def why_not_ready(self) -> str:
        """Look at the engine, and say why a request sent now would not be answered; empty if it would."""
        engine = self.engine
        says = "" if engine.is_ready else engine.why_not_ready
        why = self._readiness.observe(time.monotonic_ns(), engine.stats(), says)
        if self.is_broken:
            why = says or "the engine is broken"
        return "the server is shutting down" if self.is_draining else why

    async def metrics_text(self) -> bytes:
        """Metrics of all edges as Prometheus' text; of this one alone if nobody answers who knows of the others."""
        if self._service is None or self._service.is_whole:
            return self.render_whole()
        told = await self._service.ask()
        return self.metrics.render_alone(self._service.edge) if told is None else told.metrics

    async def server_load(self) -> int:
        """Sequences that clients of all edges wait for; of this one alone if nobody answers who knows of the others."""
        if self._service is None or self._service.is_whole:
            return self.num_live_of_all()
        told = await self._service.ask()
        return self.engine.stats().num_live if told is None else told.num_live

    def own_families(self, own_stats: EngineStats) -> tuple[SampleFamily, ...]:
        """See `OwnAccount`."""
        assert self._service is not None
        return self.metrics.own_families(self._service.edge, own_stats)

    def render_whole(self) -> bytes:
        """See `OwnAccount`."""
        if self._service is None:
            return self.metrics.render()
        return self.metrics.render_sum(self._service.edge, self._service.of_others())

    def num_live_of_all(self) -> int:
        """See `OwnAccount`."""
        return self.engine.stats().num_live + (self._service.num_live_of_others if self._service is not None else 0)

    def count_refusal(self) -> None:
        """Log how many requests were refused for lack of room, once a second at most."""
        self._num_refusals += 1
        now_ns = time.monotonic_ns()
        if now_ns - self._refusals_logged_ns >= 1_000_000_000:
            log.info("requests.refused", num=self._num_refusals, open=self.admission.num_open)
            self._num_refusals, self._refusals_logged_ns = 0, now_ns

    @property
    def is_broken(self) -> bool:
        """Whether nothing but a new start of the server helps."""
        return self.engine.is_broken

    @contextmanager
    def following(self, exchange: Exchange) -> Iterator[None]:
        """The exchange is open until the block ends: a drain waits for it, and ends it in the end."""
        self._open[exchange] = None
        trace = CURRENT.get()
        if trace is not None:
            trace.exchanges.append(exchange)
        self._none_open.clear()
        try:
            yield
        finally:
            del self._open[exchange]
            if not self._open:
                self._none_open.set()

    async def wait_none_open(self) -> None:
        """Return once every response is over."""
        await self._none_open.wait()

    def end_open(self, error: ApiError) -> int:
        """Tell the clients of all open responses that this was it; returns how many."""
        exchanges = list(self._open)
        for exchange in exchanges:
            exchange.end(error)
        return len(exchanges)

    def model_name(self, asked: str | None) -> str:
        """The name under which to answer.

        Raises:
            ApiError: 404, there is no such model.
        """
        if asked is None or asked == "":
            return self.model_names[0]
        if asked in self.model_names:
            return asked
        if not asked.isprintable():
            raise ApiError(400, "model must be printable text", param="model", code="invalid_request")
        raise ApiError(
            404,
            f"there is no model {asked!r} here: GET /v1/models names those that are served",
            param="model",
            code="model_not_found",
        )

    def refuse_if_not_serving(self) -> None:
        """Refuse new work while the server drains or the engine cannot answer.

        Raises:
            ApiError: 503.
        """
        if self.is_draining:
            raise ApiError(
                503,
                "the server is shutting down: try again later",
                code="engine_closed",
                headers={"Retry-After": "5", "Connection": "close"},
            )


CONTEXT = web.AppKey("context", GatewayContext)
REQUEST_ID = web.RequestKey("request_id", str)
CORS: web.RequestKey[dict[str, str]] = web.RequestKey("cors", dict[str, str])
SERVER_NAME = "octavo"
"""Of the `Server` header; versions of what is inside are nobody's business."""
