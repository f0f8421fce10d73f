"""`POST /debug/crash`: make one actor fail, on a server that was started for it (`--enable-fault-injection`)."""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

import msgspec
import structlog
from aiohttp import web

from ...messages.errors import OctavoError
from .context import CONTEXT
from .http_errors import ApiError, from_public_error
from .json_body import BodyDecoder
from .respond import json_response

log = structlog.get_logger("octavo.faults")

ACTORS: Final = ("executor", "scheduler", "kv_allocator", "engine", "tokenizer", "detokenizer")
"""What may be asked to fail; an engine may know fewer."""


@runtime_checkable
class CrashesActors(Protocol):
    """An engine that lets its actors fail on demand."""

    def crash_actor(self, actor: str) -> None:
        """Make the actor raise at its next message, as a defect in it would.

        Raises:
            InvalidRequestError: this engine has no such actor, or cannot make it fail; the message names those it can.
        """


class CrashRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of the route."""

    actor: str


_CRASH = BodyDecoder(CrashRequest)


async def handle_crash(http_request: web.Request) -> web.Response:
    """Crash the named actor; answers as soon as it was told."""
    context = http_request.app[CONTEXT]
    settings = context.settings
    request = await _CRASH.read(http_request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    engine = context.engine
    if request.actor not in ACTORS:
        raise ApiError(400, f"actor is none of {', '.join(ACTORS)}", param="actor", code="invalid_request")
    if not isinstance(engine, CrashesActors):
        raise ApiError(501, "this engine cannot make its actors fail", code="not_implemented")
    try:
        engine.crash_actor(request.actor)
    except OctavoError as error:
        raise from_public_error(error) from None
    log.warning("fault.injected", actor=request.actor)
    return json_response({"crashed": request.actor})
