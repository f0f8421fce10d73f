"""The HTTP server: routes, what surrounds each request, and the life of the process's socket."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import ipaddress
import re
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import structlog
from aiohttp import web

from .auth import KeyRing, check_host, check_origin, cors_headers, preflight_response
from .context import CONTEXT, CORS, REQUEST_ID, SERVER_NAME, GatewayContext
from .early_refusal import GENERATION_PATHS, EarlyRefusals, refusal_error, since_arrival_s
from .engine_protocol import EngineLike
from .fault_injection import handle_crash
from .held_streams import HELD_STREAMS
from .http_connection import EARLY_REFUSALS, GatewayRunner
from .http_errors import ApiError
from .model_routes import (
    handle_detokenize,
    handle_health,
    handle_live,
    handle_load,
    handle_metrics,
    handle_model,
    handle_models,
    handle_tokenize,
    handle_version,
)
from .openai_chat import handle_chat_completions
from .openai_completions import handle_completions
from .openapi import handle_openapi
from .readiness import LOOK_EVERY_S
from .settings import ServerSettings
from .stream_resume import hold_streams
from .telemetry import CURRENT

log = structlog.get_logger("octavo.http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_BACKLOG = 4096
_ACCEPTS_AT_ONCE = 16
_FLUSH_S: Final = 1.0  # for the last words of responses that are ended before their time
_EXPECT_CONTINUE: Final = "100-continue"
_PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def create_app(engine: EngineLike, settings: ServerSettings) -> web.Application:
    """The application: serve it with `serve_http`, or with `GatewayRunner` under your own control.

    Args:
        engine: must be running by the time requests come.
    """
    app = web.Application(middlewares=[_surround], client_max_size=settings.max_body_bytes)
    app[CONTEXT] = GatewayContext(engine, settings)
    app[_KEYS] = KeyRing(settings.api_keys)
    app[EARLY_REFUSALS] = EarlyRefusals(app[CONTEXT], app[_KEYS])
    for method, path, handler in (
        ("GET", "/", handle_playground),
        ("GET", "/health", handle_health),
        ("GET", "/ready", handle_health),
        ("GET", "/ping", handle_health),
        ("POST", "/ping", handle_health),
        ("GET", "/live", handle_live),
        ("GET", "/version", handle_version),
        ("GET", "/metrics", handle_metrics),
        ("GET", "/load", handle_load),
        ("GET", "/openapi.json", handle_openapi),
        ("GET", "/v1/models", handle_models),
        ("GET", "/v1/models/{model:.+}", handle_model),
        ("POST", "/v1/completions", handle_completions),
        ("POST", "/v1/chat/completions", handle_chat_completions),
        ("POST", "/tokenize", handle_tokenize),
        ("POST", "/detokenize", handle_detokenize),
    ):
        app.router.add_route(method, path, handler, expect_handler=_expect)
        if method == "GET":  # load balancers ask so; the library leaves the body out
            app.router.add_route("HEAD", path, handler, expect_handler=_expect)
    if settings.stream_journal:
        hold_streams(app, Path(settings.stream_journal))
    if settings.enable_fault_injection:
        app.router.add_route("POST", "/debug/crash", handle_crash, expect_handler=_expect)
    return app


async def handle_playground(request: web.Request) -> web.Response:
    """A page to chat with the model."""
    return web.Response(text=_playground(), content_type="text/html", headers=_PAGE_HEADERS)


def _playground() -> str:
    return (importlib.resources.files(__package__) / "playground.html").read_text(encoding="utf-8")


_KEYS = web.AppKey("keys", KeyRing)


@web.middleware
async def _surround(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What every request has round it: an id, the right to be here, errors in one shape, a count, a log line."""
    context = request.app[CONTEXT]
    settings = context.settings
    started = time.monotonic()
    asked_id = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = asked_id if _REQUEST_ID.fullmatch(asked_id) else secrets.token_hex(16)
    request[CORS] = cors_headers(request, settings.allowed_origins)
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else "other"
    status = 499  # the client left before there was an answer
    error_code, num_bytes = None, 0
    trace = None if context.tracing is None else context.tracing.begin(request, path)
    CURRENT.set(trace)
    try:
        try:
            response = await _admit(request, handler)
        except ApiError as error:
            error_code = error.code
            response = error.response()
        except web.HTTPException as error:
            response = _of_http_exception(error).response()
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.exception("request.crashed", request_id=request[REQUEST_ID], path=path)
            error_code = "internal_error"
            response = ApiError(500, "an error inside the server; it was logged", code=error_code).response()
        status, num_bytes = response.status, response.content_length or 0
        if not response.prepared:
            response.headers["x-request-id"] = request[REQUEST_ID]
            response.headers["Server"] = SERVER_NAME
            response.headers.update(request[CORS])
        return response
    finally:
        seconds = time.monotonic() - started
        context.metrics.http_ended(
            path, request.method, status, seconds, num_asked=request.content_length or 0, num_answered=num_bytes
        )
        if trace is not None:
            trace.end(status, request[REQUEST_ID], is_error=status >= 500)
        if status == 429 and settings.log_requests:
            # Thousands of clients may be refused in a second: a line for each would cost more than the refusals.
            context.count_refusal()
        elif settings.log_requests and request.method == "POST":
            log.info(
                "request.finished",
                request_id=request[REQUEST_ID],
                path=path,
                status=status,
                code=error_code,
                ms=round(seconds * 1e3, 1),
            )


async def _admit(request: web.Request, handler: Handler) -> web.StreamResponse:
    settings = request.app[CONTEXT].settings
    check_host(request, settings.allowed_hosts)
    preflight = preflight_response(request, settings.allowed_origins)
    if preflight is not None:
        return preflight
    check_origin(request, settings.allowed_origins)
    request.app[_KEYS].check(request)
    resource = request.match_info.route.resource
    if resource is None or resource.canonical not in GENERATION_PATHS or request.method != "POST":
        return await handler(request)
    return await _generate(request, handler)


async def _generate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let work in or refuse it, before its body is read: a refusal must cost next to nothing."""
    context = request.app[CONTEXT]
    context.refuse_if_not_serving()
    most_bytes = context.settings.max_body_bytes
    num_bytes = most_bytes if request.content_length is None else min(request.content_length, most_bytes)
    refusal = context.admission.admit(time.monotonic_ns(), num_bytes)
    if refusal is not None:
        if request.transport is not None:
            context.metrics.refused(since_arrival_s(request.transport))
        raise refusal_error(refusal)
    try:
        return await handler(request)
    except ApiError as error:
        if error.status == 429:
            # The engine knows that it is full, not for how long.
            retry_after_s = context.admission.retry_after_s(time.monotonic_ns())
            error.headers["Retry-After"] = str(max(retry_after_s, int(error.headers.get("Retry-After", "1"))))
        raise
    finally:
        context.admission.release(num_bytes)


async def _expect(request: web.Request) -> web.StreamResponse | None:
    if request.headers.get("Expect", "").lower() != _EXPECT_CONTINUE:
        return ApiError(417, "of expectations only 100-continue can be met", code="expectation_failed").response()
    if request.content.is_eof():
        return None  # it did not wait
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # What was written so far belongs to no response yet.
    request.writer.output_size = 0
    return None


def _of_http_exception(error: web.HTTPException) -> ApiError:
    if error.status == 404:
        return ApiError(404, "there is nothing at this path: GET /openapi.json names what there is", code="not_found")
    if error.status == 405:
        allow = error.headers.get("Allow", "")
        return ApiError(405, f"this path answers to {allow} only", code="method_not_allowed", headers={"Allow": allow})
    if error.status == 413:
        return ApiError(413, "the body is too long", code="body_too_large", headers={"Connection": "close"})
    return ApiError(error.status, error.reason, code="http_error")


class RunningServer:
    """A server that accepts connections.

    Attributes:
        port: the one it listens on.
    """

    def __init__(self, runner: GatewayRunner, context: GatewayContext, port: int) -> None:
        self.port = port
        self._runner = runner
        self._context = context
        self._watch = asyncio.create_task(_watch_engine(context))

    @property
    def num_open_streams(self) -> int:
        return self._context.pump.num_open

    @property
    def num_admitted(self) -> int:
        """Requests for work that were let in since the start."""
        return self._context.admission.num_admitted

    async def drain(self) -> None:
        """Let open responses end, within `shutdown_timeout_s`; then end the rest, and tell their clients so.

        From the first moment on the server is not ready, and new work gets 503. It goes on listening until the last
        response is over: a client that is refused in words comes back, one whose connection is refused may not.
        """
        context = self._context
        context.is_draining = True
        if (held := self._runner.app.get(HELD_STREAMS)) is not None:
            held.leave_unread()  # the next server takes them up
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(context.settings.shutdown_timeout_s):
                # First ours, then the engine's: it would refuse what was accepted here and is on its way still.
                await context.wait_none_open()
                await context.engine.drain()
        await self.end_open()
        for site in list(self._runner.sites):
            await site.stop()

    async def end_open(self) -> None:
        """End what is open with an error that says why, and give it a moment to leave."""
        context = self._context
        context.is_draining = True
        num_ended = context.end_open(
            ApiError(
                503,
                "the server was shut down before the answer was complete: ask again",
                code="server_shutdown",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        )
        if num_ended:
            log.warning("server.cut", responses=num_ended)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await context.wait_none_open()
                await context.pump.wait_closed()

    async def close(self) -> None:
        """Cut what is still open."""
        self._context.is_draining = True
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await self._runner.cleanup()
        if self._context.tracing is not None:
            await asyncio.to_thread(self._context.tracing.close)


async def _watch_engine(context: GatewayContext) -> None:
    """Look at the engine now and then, so that whoever asks hears how long it has stood still."""
    while True:
        context.why_not_ready()
        await asyncio.sleep(LOOK_EVERY_S)


async def start_http(
    engine: EngineLike,
    settings: ServerSettings,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    is_port_shared: bool = False,
) -> RunningServer:
    """Listen, and return once connections are accepted. Port 0 takes a free one.

    Args:
        is_port_shared: other processes of this server listen there, too; the system shares connections out.

    Raises:
        OSError: the address is taken or not this machine's.
    """
    if settings.allowed_hosts or (_is_loopback(host) and not settings.api_keys):
        # Without a key, any web page could reach a local server by binding its own name to 127.0.0.1.
        settings = msgspec.structs.replace(settings, allowed_hosts=("localhost", *settings.allowed_hosts))
    app = create_app(engine, settings)
    runner = GatewayRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=_ACCEPTS_AT_ONCE, reuse_address=True, reuse_port=is_port_shared)
        await site.start()
        _lengthen_queue(site)
    except BaseException:
        await runner.cleanup()
        raise
    return RunningServer(runner, app[CONTEXT], runner.addresses[0][1])


async def serve_http(
    engine: EngineLike,
    settings: ServerSettings,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    stop: asyncio.Event | None = None,
    abort: asyncio.Event | None = None,
    handle_signals: bool = True,
    on_listening: Callable[[int], None] | None = None,
    is_port_shared: bool = False,
) -> None:
    """Serve until told to stop, then let open responses end.

    Args:
        stop: set it to stop; SIGTERM and SIGINT do the same, and SIGHUP where it is not ignored (`nohup`): with the
            terminal goes the server, but no stream.
        abort: set it, too, to cut open responses off; a second signal does the same.
        handle_signals: whether to take those signals while serving.
        on_listening: called with the port once connections are accepted.
        is_port_shared: as of `start_http`.
    """
    stop = stop or asyncio.Event()
    abort = abort or asyncio.Event()
    server = await start_http(engine, settings, host, port, is_port_shared=is_port_shared)

    def on_signal() -> None:
        if stop.is_set():
            abort.set()
        stop.set()

    loop = asyncio.get_running_loop()
    signals = _stopping_signals() if handle_signals else ()
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        if on_listening is not None:
            on_listening(server.port)
        await stop.wait()
        log.info("server.draining")
        draining = asyncio.ensure_future(server.drain())
        aborting = asyncio.ensure_future(abort.wait())
        await asyncio.wait([draining, aborting], return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, aborting):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining
        if abort.is_set():
            await server.end_open()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        await server.close()


def _stopping_signals() -> tuple[signal.Signals, ...]:
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN:
        return (signal.SIGTERM, signal.SIGINT)
    return (signal.SIGTERM, signal.SIGINT, hangup)


def _lengthen_queue(site: web.TCPSite) -> None:
    """Let the system queue `_BACKLOG` connections, of which the loop still accepts `_ACCEPTS_AT_ONCE` a turn.

    asyncio has one number for both, and until Python 3.13 tries to accept that often although it has no file
    descriptor left, each time with a traceback: thousands of them would hold up every open stream.
    """
    server = site._server  # no public name leads to its sockets
    assert isinstance(server, asyncio.Server)
    for listening in server.sockets:
        with socket.fromfd(listening.fileno(), listening.family, listening.type) as same:
            same.listen(_BACKLOG)


def _is_loopback(host: str) -> bool:
    if host in ("localhost", ""):
        return host == "localhost"
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
