"""From an exchange to an HTTP response, whole or streamed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from .context import CONTEXT, CORS, REQUEST_ID, SERVER_NAME, GatewayContext
from .exchange import ChunkSink, Exchange, PromptState, SubmitOptions
from .sse import EventStream

KEEP_ALIVE_COMMENT = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def new_response_id(prefix: str, asked: str | None) -> str:
    """An id for the response; internally requests go by the engine's own ids, so clients cannot confuse them."""
    return f"{prefix}-{asked or secrets.token_hex(16)}"


def json_response(value: Any) -> web.Response:
    return web.Response(body=_encode(value), content_type="application/json")


async def respond_whole(
    context: GatewayContext,
    exchange: Exchange,
    prompts: Sequence[PromptState],
    options: SubmitOptions,
    make_body: Callable[[], Any],
) -> web.Response:
    """Wait for every sequence, then answer. Leaving early, by an error or a disconnect, cancels what is left.

    Raises:
        ApiError: the request was refused or failed.
    """
    try:
        exchange.submit(prompts, options)
        context.metrics.submitted(exchange)
        await exchange.done
    finally:
        exchange.cancel()
    return json_response(make_body())


async def respond_stream(
    request: web.Request,
    exchange: Exchange,
    prompts: Sequence[PromptState],
    options: SubmitOptions,
    make_chunks: Callable[[EventStream], ChunkSink],
) -> web.StreamResponse:
    """Answer as a stream of events. The headers wait for the first token, so that a refusal is a plain HTTP error.

    Raises:
        ApiError: the request was refused or failed before its first token.
    """
    context = request.app[CONTEXT]
    stream = EventStream(context.pump, exchange.cancel)
    exchange.stream_to(make_chunks(stream))
    try:
        exchange.submit(prompts, options)
        context.metrics.submitted(exchange)
        await exchange.started
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "x-request-id": request[REQUEST_ID],
                "Server": SERVER_NAME,
            }
        )
        for name, value in request[CORS].items():
            response.headers[name] = value
        await stream.open(request, response)
        exchange.release_held()
        await _until_done(exchange, stream, context.settings.sse_keep_alive_s)
        await stream.close()
    finally:
        exchange.cancel()
        stream.release()
    return response


async def _until_done(exchange: Exchange, stream: EventStream, keep_alive_s: float) -> None:
    while not exchange.done.done():
        if keep_alive_s <= 0:
            await asyncio.wait([exchange.done])
            return
        num_writes = stream.num_writes
        await asyncio.wait([exchange.done], timeout=keep_alive_s)
        if stream.num_writes == num_writes:
            stream.write(KEEP_ALIVE_COMMENT)
