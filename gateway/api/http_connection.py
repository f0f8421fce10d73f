"""An HTTP connection and what makes one: this gateway's timers, limits and errors, and its care for the half-closed."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from .connections import ConnectionTable, RefusedConnection, ResponseWriter, peer_address, raw_response
from .context import CONTEXT, SERVER_NAME
from .early_refusal import EarlyRefusals, read_head
from .http_errors import ApiError
from .settings import ServerSettings

log = structlog.get_logger("octavo.http")

LINGERING_S: Final = 2.0
EARLY_REFUSALS: Final = web.AppKey("early_refusals", EarlyRefusals)


class GatewayProtocol(RequestHandler):
    """A connection whose broken requests are answered in the shape of all other errors, and not waited for for ever.

    A client that closes its sending half after a whole request is served to the end; one that turns out to be gone
    altogether is dropped, and its request with it. A request that is not let in is refused here, where that can be told
    from its head, and the library never hears of it.
    """

    __slots__ = (
        "_address",
        "_body_timer",
        "_fd",
        "_header_timer",
        "_is_half_closed",
        "_num_owed",
        "_num_unwanted",
        "_payload",
        "_refusals",
        "_settings",
        "_table",
        "_writer",
    )

    def __init__(
        self, *args: Any, settings: ServerSettings, table: ConnectionTable, refusals: EarlyRefusals, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refusals = refusals
        # Bytes that the library's current request still lacks; None once it cannot be told where that ends.
        self._num_owed: int | None = 0
        self._num_unwanted = 0  # bytes of a refused body that are to come
        self._body_timer: asyncio.TimerHandle | None = None
        self._settings = settings
        self._table = table
        self._header_timer: asyncio.TimerHandle | None = None
        self._address: str | None = None
        self._fd = -1
        self._is_half_closed = False
        # Of the request that is being served; both None between requests.
        self._payload: StreamReader | None = None
        self._writer: ResponseWriter | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        address = peer_address(transport)
        refusal = self._table.admit(address)
        if refusal is not None:
            refused = RefusedConnection(self._table, refusal)
            assert isinstance(transport, asyncio.Transport)
            transport.set_protocol(refused)
            refused.connection_made(transport)
            return
        self._address = address
        super().connection_made(transport)
        self._header_timer = self._loop.call_later(self._settings.header_timeout_s, self._headers_overdue)

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._header_timer, self._body_timer):
            if timer is not None:
                timer.cancel()
        if self._is_half_closed:
            self._table.hangups.forget(self._fd)
        if self._address is not None:
            self._table.release(self._address)
            self._address = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Refuse what is not let in; the library gets everything else."""
        if self._num_unwanted:
            num_dropped = min(self._num_unwanted, len(data))
            self._num_unwanted -= num_dropped
            if not self._num_unwanted and self._body_timer is not None:
                self._body_timer.cancel()
                self._body_timer = None
            if num_dropped == len(data):
                return
            data = data[num_dropped:]
        owed = self._num_owed
        if owed == 0:
            head = read_head(data)
            if head is None or len(data) > head.num_bytes:
                self._num_owed = None
            else:
                self._num_owed = head.num_bytes - len(data)
                if self._is_idle() and self.transport is not None:
                    answer = self._refusals.answer(head, self.transport)
                    if answer is not None:
                        self._refuse(answer)
                        return
        elif owed is not None:
            self._num_owed = owed - len(data) if len(data) <= owed else None
        super().data_received(data)

    def _is_idle(self) -> bool:
        """Whether the library waits for a request, and everything that was answered has been taken."""
        waiter, transport = self._waiter, self.transport
        return (
            waiter is not None
            and not waiter.done()
            and not self._messages
            and not (self._close or self._force_close or self._is_half_closed)
            and isinstance(transport, asyncio.Transport)
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0
        )

    def _refuse(self, answer: bytes) -> None:
        assert isinstance(self.transport, asyncio.Transport)
        self.transport.write(answer)
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        self._num_unwanted, self._num_owed = self._num_owed or 0, 0
        if self._num_unwanted:
            self._body_timer = self._loop.call_later(
                min(LINGERING_S, self._settings.body_timeout_s), self._body_overdue
            )

    def _body_overdue(self) -> None:
        self._body_timer = None
        self.force_close()

    def begin_request(self, payload: StreamReader) -> ResponseWriter:
        """A request's turn has come; returns the writer of its response."""
        self._payload = payload
        self._writer = ResponseWriter(self, self._loop)
        return self._writer

    def eof_received(self) -> bool | None:  # type: ignore[override]  # the library's never keeps the connection
        """The client sends no more. True keeps the connection open for writing."""
        payload = self._messages[-1][1] if self._messages else self._payload
        if payload is None or not payload.is_eof() or self.transport is None or not self._table.hangups.is_available:
            return None  # nothing that could be answered, or half a request
        if not self._is_half_closed:
            self._is_half_closed = True
            self._fd = self.transport.get_extra_info("socket").fileno()
            self._table.hangups.watch(self._fd, self._hung_up)
        if self._writer is not None:
            self._writer.probe()
        return True

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is left of a response; after the last one to a half-closed client the connection closes."""
        if self._is_half_closed and not self._messages:
            if not resp.prepared:
                resp.force_close()
            self.close()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._payload = self._writer = None
            if self._is_half_closed and not self._messages:
                self.close()

    def _hung_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _headers_overdue(self) -> None:
        self._header_timer = None
        if self._request_count == 0 and self.transport is not None:
            error = ApiError(408, "the request's headers did not arrive in time", code="request_timeout")
            self.transport.write(raw_response(error))
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed, or what went wrong outside every handler.

        Raises:
            ConnectionError: nobody is there to answer; the library then closes the connection without a word.
        """
        if isinstance(exc, ConnectionError) and (self.transport is None or self.transport.is_closing()):
            # Gone before its headers: `connection_lost`, which cancels the handler, is a turn of the loop away.
            raise exc
        if status >= 500:
            log.error("request.crashed", exc_info=exc)
            error = ApiError(500, "an error inside the server; it was logged", code="internal_error")
        else:
            # The parser's words quote what was sent; they are of no use to an honest client.
            error = ApiError(status, "this is not a well-formed HTTP request", code="malformed_http")
        if request.writer.output_size > 0:
            raise ConnectionError("part of a response was sent already")
        response = error.response()
        response.headers["Server"] = SERVER_NAME
        response.force_close()
        return response


class GatewayServer(web.Server):
    """Makes a `GatewayProtocol` for each connection."""

    def __init__(
        self, *args: Any, settings: ServerSettings, table: ConnectionTable, refusals: EarlyRefusals, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._table = table
        self._refusals = refusals

    def __call__(self) -> GatewayProtocol:
        return GatewayProtocol(
            self,
            loop=self._loop,
            settings=self._settings,
            table=self._table,
            refusals=self._refusals,
            **self._kwargs,
        )


class GatewayRunner(web.AppRunner):
    """Runs the application with this gateway's timers, limits and errors."""

    __slots__ = ("_settings", "_table")

    def __init__(self, app: web.Application) -> None:
        settings = app[CONTEXT].settings
        super().__init__(
            app,
            access_log=None,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=settings.keepalive_timeout_s,
            # How long to go on reading a body that was refused, so that the client gets to see the answer.
            lingering_time=min(LINGERING_S, settings.body_timeout_s),
            # Open responses were waited for before; what is left then is cut.
            shutdown_timeout=1.0,
        )
        self._settings = settings
        self._table = app[CONTEXT].connections

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        make_request = made.request_factory

        def begin_request(
            message: RawRequestMessage, payload: StreamReader, protocol: RequestHandler, _writer: Any, task: Any
        ) -> web.BaseRequest:
            assert isinstance(protocol, GatewayProtocol)
            return make_request(message, payload, protocol, protocol.begin_request(payload), task)

        return GatewayServer(
            made.request_handler,
            request_factory=begin_request,
            handler_cancellation=made.handler_cancellation,
            loop=asyncio.get_running_loop(),
            settings=self._settings,
            table=self._table,
            refusals=self.app[EARLY_REFUSALS],
            **made._kwargs,
        )

    async def cleanup(self) -> None:
        await super().cleanup()
        self._table.hangups.close()
