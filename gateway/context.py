"""What every route of one server shares."""

from __future__ import annotations

from aiohttp import web

from .connections import ConnectionTable
from .engine_protocol import EngineLike
from .http_errors import ApiError
from .metrics import GatewayMetrics
from .settings import ServerSettings
from .sse import StreamPump


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
        self.metrics = GatewayMetrics(engine, self.model_names[0], self.pump, self.connections)
        self.is_draining = False

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
                503, "the server is shutting down: try again later", code="engine_closed", headers={"Retry-After": "5"}
            )


CONTEXT = web.AppKey("context", GatewayContext)
REQUEST_ID = web.RequestKey("request_id", str)
CORS: web.RequestKey[dict[str, str]] = web.RequestKey("cors", dict[str, str])
SERVER_NAME = "octavo"
"""Of the `Server` header; versions of what is inside are nobody's business."""
