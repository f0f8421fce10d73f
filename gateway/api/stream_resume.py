"""Taking up streams where a server, or a connection, was lost: install it with `hold_streams`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import structlog
from aiohttp import web

from .context import CONTEXT, GatewayContext
from .held_streams import HELD_STREAMS, EventPosition, HeldStreams, HoldLimits, last_event
from .http_errors import ApiError
from .openai_chat import plan_chat_again
from .openai_completions import plan_completion_again
from .respond import AnswerPlan, respond_again
from .stream_journal import StreamJournal, StreamRecord

log = structlog.get_logger("octavo.streams")

RETRY_S: Final = 0.5
"""Between two tries to give a stream back to an engine that is full or not ready yet."""

_NOT_NOW: Final = (429, 503)

_PlanAgain = Callable[[GatewayContext, StreamRecord], Awaitable[AnswerPlan]]
_PLAN_AGAIN: Final[dict[Literal["chat", "completion"], _PlanAgain]] = {
    "chat": plan_chat_again,
    "completion": plan_completion_again,
}


def hold_streams(app: web.Application, folder: Path, limits: HoldLimits | None = None) -> HeldStreams:
    """Number and hold the events of all streamed responses, and note the streams in a journal.

    Call it on a new application. When that is set up, with an engine that runs by then, what the last server left
    unfinished is generated again: tokens are a function of the recipe, so the events are those that clients know. A
    client goes on by sending the same request again, or `GET /v1/responses-stream/<response id>`, with the header
    `Last-Event-ID` naming the last event that it has had.

    Args:
        folder: of the journal; one server at a time.

    Raises:
        InvalidConfigError: the folder cannot be used.
    """
    journal = StreamJournal(folder)
    streams = app[HELD_STREAMS] = HeldStreams(journal, app[CONTEXT].pump, limits)
    app[CONTEXT].metrics.tell(
        "octavo:stream_journal_failed_writes",
        "Notes of open streams not written, or not in time; those streams cannot be taken up after a crash.",
        lambda: journal.num_failed_writes,
    )
    app.router.add_get("/v1/responses-stream/{response_id}", handle_resume)
    app.cleanup_ctx.append(_take_up)
    return streams


async def handle_resume(request: web.Request) -> web.StreamResponse:
    """A held stream from its beginning, or behind the event that `Last-Event-ID` names."""
    response_id = request.match_info["response_id"]
    position = last_event(request) or EventPosition(response_id)
    if position.response_id != response_id:
        raise ApiError(
            400, "Last-Event-ID names another stream than the path", param="Last-Event-ID", code="invalid_event_id"
        )
    return await respond_again(request, position)


async def _take_up(app: web.Application) -> AsyncIterator[None]:
    streams = app[HELD_STREAMS]
    waiting = [record for record in streams.journal.to_resume if not await _begin(app, record)]
    retrying = asyncio.create_task(_retry(app, waiting))
    if streams.journal.to_resume:
        log.info("streams.taken_up", streams=len(streams.journal.to_resume), waiting=len(waiting))
    yield
    retrying.cancel()
    with suppress(asyncio.CancelledError):
        await retrying
    await streams.close()


async def _retry(app: web.Application, waiting: list[StreamRecord]) -> None:
    while waiting:
        await asyncio.sleep(RETRY_S)
        waiting = [record for record in waiting if not await _begin(app, record)]


async def _begin(app: web.Application, record: StreamRecord) -> bool:
    """Generate a stream again; False if the engine cannot take it now."""
    context, streams = app[CONTEXT], app[HELD_STREAMS]
    try:
        plan = await _PLAN_AGAIN[record.kind](context, record)
    except ApiError as error:
        if error.status in _NOT_NOW:
            return False
        # Another model, or narrower bounds.
        log.error("stream.refused_again", response_id=record.response_id, code=error.code, why=error.message)
        streams.give_up(record)
        return True
    held = streams.hold(record, plan.exchange)
    plan.exchange.stream_to(held.chunks(plan.make_chunks))
    try:
        plan.exchange.submit(plan.prompts, plan.options)
    except ApiError as error:
        if error.status in _NOT_NOW:
            streams.put_off(held)
            return False
        log.error("stream.refused_again", response_id=record.response_id, code=error.code, why=error.message)
        streams.drop(held)
        return True
    context.metrics.submitted(plan.exchange.params)
    held.release()
    streams.taken_up(held)
    return True
