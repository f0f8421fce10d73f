"""From an exchange to an HTTP response, whole or streamed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
from aiohttp import HttpVersion11, web

from .choice import PromptState
from .context import CONTEXT, CORS, REQUEST_ID, SERVER_NAME, GatewayContext
from .exchange import ChunkSink, Exchange, SubmitOptions
from .held_streams import HELD_STREAMS, EventPosition, HeldStream, HeldStreams, last_event, owner_of
from .http_errors import ApiError
from .json_body import BodyDecoder, read_bytes
from .protocol import SamplingFields
from .sse import EventResponse, EventSink, EventStream
from .stream_journal import StreamRecord

_Body = TypeVar("_Body", bound=SamplingFields)

KEEP_ALIVE_COMMENT = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def new_response_id(prefix: str, asked: str | None) -> str:
    """An id for the response; internally requests go by the engine's own ids, so clients cannot confuse them."""
    return f"{prefix}-{asked or secrets.token_hex(16)}"


def json_response(value: Any) -> web.Response:
    return web.Response(body=_encode(value), content_type="application/json")


class AnswerPlan(NamedTuple):
    """What it takes to generate a response, and to do so again if it is streamed.

    Attributes:
        make_body: of a whole response, once every sequence has ended.
        make_chunks: gives the exchange somewhere to tell its deltas, which writes events to the sink it is given.
        response_id, created: as the client is told.
        kind: which endpoint's request it answers.
    """

    exchange: Exchange
    prompts: Sequence[PromptState]
    options: SubmitOptions
    make_body: Callable[[], Any]
    make_chunks: Callable[[EventSink], ChunkSink]
    response_id: str
    created: int
    kind: Literal["chat", "completion"]


async def respond(
    request: web.Request,
    decoder: BodyDecoder[_Body],
    make_plan: Callable[[GatewayContext, _Body], Awaitable[AnswerPlan]],
) -> web.StreamResponse:
    """Answer a request whole, as a stream, or from where its client was in one.

    Args:
        decoder: of its body.

    Raises:
        ApiError: the request was refused, or failed before its first token.
    """
    context = request.app[CONTEXT]
    settings = context.settings
    context.refuse_if_not_serving()
    body = await read_bytes(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    decoded = await decoder.decode_in_turns(body)
    position = last_event(request)
    if position is not None:
        return await respond_again(request, position, body)
    plan = await make_plan(context, decoded)
    return await (_respond_stream(request, plan, body) if decoded.stream else _respond_whole(context, plan))


async def _respond_whole(context: GatewayContext, plan: AnswerPlan) -> web.Response:
    """Wait for every sequence, then answer. Leaving early, by an error or a disconnect, cancels what is left."""
    exchange = plan.exchange
    with context.following(exchange):
        try:
            exchange.submit(plan.prompts, plan.options)
            context.metrics.submitted(exchange.params)
            await exchange.done
        finally:
            exchange.cancel()
    return json_response(plan.make_body())


async def _respond_stream(request: web.Request, plan: AnswerPlan, body: bytes) -> web.StreamResponse:
    """Answer as a stream of events. The headers wait for the first token, so that a refusal is a plain HTTP error.

    With a journal of streams the events are numbered and held, and the client may go on where it was
    (`respond_again`). Where that cannot be (`HeldStreams.may_hold`) they are sent without numbers, and not held.
    """
    streams = request.app.get(HELD_STREAMS)
    if streams is not None and streams.may_hold(plan.response_id, plan.exchange.params.n * len(plan.prompts)):
        return await _respond_held(request, streams, plan, body)
    context = request.app[CONTEXT]
    exchange = plan.exchange
    stream = EventStream(context.pump, exchange.cancel)
    exchange.stream_to(plan.make_chunks(stream))
    with context.following(exchange):
        try:
            exchange.submit(plan.prompts, plan.options)
            context.metrics.submitted(exchange.params)
            await exchange.started
            response = _event_response(request)
            await stream.open(request, response)
            exchange.release_held()
            await _until_done(exchange.done, stream, context.settings.sse_keep_alive_s)
            await stream.close()
        finally:
            exchange.cancel()
            stream.release()
    return response


async def _respond_held(
    request: web.Request, streams: HeldStreams, plan: AnswerPlan, body: bytes
) -> web.StreamResponse:
    context = request.app[CONTEXT]
    exchange, options = plan.exchange, plan.options
    if exchange.params.seed is None:
        # Resolved here rather than by the front end, whose generator begins anew with the next server.
        options = msgspec.structs.replace(options, seeds=streams.new_seeds(len(plan.prompts)))
    record = StreamRecord(
        *(plan.response_id, plan.created, plan.kind, body, options.seeds, owner_of(request)),
        defaults=context.engine.request_defaults,
    )
    held = streams.hold(record, exchange)
    exchange.stream_to(held.chunks(plan.make_chunks))
    with _following(context, held):
        try:
            exchange.submit(plan.prompts, options)
            context.metrics.submitted(exchange.params)
            held.note()
            await exchange.started
            await held.noted()
        except BaseException:
            # Its client was told so, or is gone before it had an event to go on from.
            streams.drop(held)
            raise
        return await _tell(request, held, EventPosition(plan.response_id))


async def respond_again(request: web.Request, position: EventPosition, body: bytes | None = None) -> web.StreamResponse:
    """Go on with a stream behind the last event that the client has had.

    Args:
        body: of a request that is sent again; it must be the same. None: the client asks by the id alone.

    Raises:
        ApiError: 404 or 410, the stream or those events are no longer there; 400, it is another request.
    """
    streams = request.app.get(HELD_STREAMS)
    if streams is None:
        raise ApiError(
            404, "this server holds no streams: send the request anew, without Last-Event-ID", code="stream_not_found"
        )
    held = streams.find(position, owner_of(request))
    if body is not None and body != held.record.body:
        raise ApiError(
            400,
            "the body is not the one that this stream answers: send the same body, or leave out Last-Event-ID",
            param="Last-Event-ID",
            code="another_request",
        )
    streams.num_resumed += 1
    await held.noted()
    return await _tell(request, held, position)


async def _tell(request: web.Request, held: HeldStream, position: EventPosition) -> web.StreamResponse:
    """Write a held stream's events behind a position, and what comes, until its end."""
    context = request.app[CONTEXT]
    client = EventStream(context.pump, lambda: held.detach(client))
    response = _event_response(request)
    with _following(context, held):
        try:
            await client.open(request, response)
            over = held.attach(client, position)
            held.release()
            await _until_done(over, client, context.settings.sse_keep_alive_s)
            await client.close()
            held.delivered(client)
        finally:
            held.detach(client)
            client.release()
    return response


@contextmanager
def _following(context: GatewayContext, held: HeldStream) -> Iterator[None]:
    """A drain waits for a held stream while anybody reads it, an old connection or a new one."""
    if not held.num_readers:
        held.following.enter_context(context.following(held.exchange))
    held.num_readers += 1
    try:
        yield
    finally:
        held.num_readers -= 1
        if not held.num_readers:
            held.following.close()
            held.left_alone()


def _event_response(request: web.Request) -> EventResponse:
    response = EventResponse(
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
    if request.version < HttpVersion11:
        response.force_close()  # without chunks nothing else tells where the stream ends
    return response


async def _until_done(done: asyncio.Future[None], stream: EventStream, keep_alive_s: float) -> None:
    while not done.done():
        if keep_alive_s <= 0:
            await asyncio.wait([done])
            return
        num_writes = stream.num_writes
        await asyncio.wait([done], timeout=keep_alive_s)
        if stream.num_writes == num_writes:
            stream.write(KEEP_ALIVE_COMMENT)
