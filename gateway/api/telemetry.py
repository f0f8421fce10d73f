"""OpenTelemetry spans of HTTP requests: off unless the standard `OTEL_*` environment asks for them.

Needs the extra `octavo[otel]`. Nothing of OpenTelemetry is imported while it is off. A span has the W3C `traceparent`
of its request as its parent, and three events where its phases begin: `queue` (it was submitted), `prefill` (its first
step was planned) and `decode` (its first token was there).
"""

from __future__ import annotations

import contextvars
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Self

import structlog
from aiohttp import web

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from .exchange import Exchange

log = structlog.get_logger("octavo.telemetry")

UNTRACED_PATHS: Final = frozenset({"/health", "/ready", "/ping", "/live", "/metrics", "/load"})
"""Probes and scrapes come every few seconds and say nothing."""

FLUSH_MS: Final = 5000
SCOPE: Final = "octavo.gateway"

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Trace:
    """One request's span, and what was generated under it."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.exchanges: list[Exchange] = []

    def end(self, status: int, request_id: str, *, is_error: bool) -> None:
        """The response is over."""
        span = self.span
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("octavo.request_id", request_id)
        for exchange in self.exchanges:
            self._tell(exchange)
        if is_error:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        span.end()

    def _tell(self, exchange: Exchange) -> None:
        span = self.span
        # Requests are timed by the monotonic clock, spans by that of the wall.
        offset_ns = time.time_ns() - time.monotonic_ns()
        span.add_event("queue", timestamp=exchange.arrival_ns + offset_ns)
        if exchange.first_scheduled_ns:
            span.add_event("prefill", timestamp=exchange.first_scheduled_ns + offset_ns)
        begun = [choice.first_token_ns for choice in exchange.choices if choice.first_token_ns]
        if begun:
            span.add_event("decode", timestamp=min(begun) + offset_ns)
        usage = exchange.usage()
        span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        reasons = [choice.finish_reason for choice in exchange.choices if choice.finish_reason]
        if reasons:
            span.set_attribute("gen_ai.response.finish_reasons", reasons)


CURRENT: contextvars.ContextVar[Trace | None] = contextvars.ContextVar("octavo.trace", default=None)
"""Of the request that the running task answers."""


class Tracing:
    """Makes spans and sends them off.

    Args:
        provider: where they go; shut down by `close`.
        model_name: attribute of every span.
    """

    def __init__(self, provider: TracerProvider, model_name: str) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        self._provider = provider
        self._tracer = provider.get_tracer(SCOPE)
        self._extract = extract
        self._kind = SpanKind.SERVER
        self._model_name = model_name

    @classmethod
    def from_environment(cls, model_name: str, environment: Mapping[str, str] = os.environ) -> Self | None:
        """Tracing as the environment asks for it; None if it does not, or the packages are missing."""
        names = exporters_of(environment)
        if not names:
            return None
        try:
            provider = _make_provider(names, environment)
        except ImportError as error:
            log.warning("telemetry.off", missing=error.name, advice="pip install 'octavo[otel]'")
            return None
        return None if provider is None else cls(provider, model_name)

    def begin(self, request: web.Request, path: str) -> Trace | None:
        """A span for this request, below the one that its headers name; None for probes.

        Args:
            path: the route's; never what a client wrote, of which there is no end.
        """
        if path in UNTRACED_PATHS:
            return None
        span = self._tracer.start_span(
            f"{request.method} {path}",
            # Header names come in any case; the propagator looks for them in lower case.
            context=self._extract({name.lower(): value for name, value in request.headers.items()}),
            kind=self._kind,
            attributes={
                "http.request.method": request.method,
                "http.route": path,
                "gen_ai.system": "octavo",
                "gen_ai.request.model": self._model_name,
            },
        )
        return Trace(span)

    def close(self) -> None:
        """Send what has not left; waits for the collector for a few seconds at most."""
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


def exporters_of(environment: Mapping[str, str]) -> list[str]:
    """Names of the exporters asked for, by OpenTelemetry's own variables; none if it is off."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    asked = environment.get("OTEL_TRACES_EXPORTER", "")
    if not asked and any(environment.get(name) for name in _ENDPOINTS):
        asked = "otlp"
    return [name for name in (part.strip().lower() for part in asked.split(",")) if name and name != "none"]


def _make_provider(names: list[str], environment: Mapping[str, str]) -> TracerProvider | None:
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporters = [exporter for name in names if (exporter := _make_exporter(name, environment)) is not None]
    if not exporters:
        return None
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before this name.
    named = Resource.create().attributes.get(SERVICE_NAME, "")
    resource = Resource.create(
        {} if named and not str(named).startswith("unknown_service") else {SERVICE_NAME: "octavo"}
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _make_exporter(name: str, environment: Mapping[str, str]) -> Any:
    """The exporter of that name, configured by the environment; None if there is none here."""
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        log.warning("telemetry.unknown_exporter", exporter=name, advice="OTEL_TRACES_EXPORTER is otlp, console or none")
        return None
    protocol = environment.get(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
