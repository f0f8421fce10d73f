"""Routes about the server itself: models, tokens, health, version, metrics."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import prometheus_client
from aiohttp import web

from ...messages.errors import InvalidRequestError, OctavoError
from ...messages.request import ChatPrompt
from .chat_messages import chat_prompt
from .context import CONTEXT, GatewayContext
from .early_refusal import refusal_error
from .http_errors import ApiError, from_public_error
from .json_body import BodyDecoder
from .protocol import DetokenizeRequest, TokenizeRequest
from .respond import json_response

_TOKENIZE = BodyDecoder(TokenizeRequest)
_DETOKENIZE = BodyDecoder(DetokenizeRequest)
_T = TypeVar("_T", bound=msgspec.Struct)
_HEALTH_HEADERS = {"Cache-Control": "no-store"}


async def handle_models(request: web.Request) -> web.Response:
    """All names under which the model is served."""
    context = request.app[CONTEXT]
    return json_response({"object": "list", "data": [_model_card(context, name) for name in context.model_names]})


async def handle_model(request: web.Request) -> web.Response:
    """One of them; names may hold slashes."""
    context = request.app[CONTEXT]
    return json_response(_model_card(context, context.model_name(request.match_info["model"])))


def _model_card(context: GatewayContext, name: str) -> dict[str, Any]:
    engine = context.engine
    return {
        "id": name,
        "object": "model",
        "created": engine.created,
        "owned_by": "octavo",
        "root": engine.model_name,
        "parent": None,
        "max_model_len": engine.max_model_len,
        "permission": [],
    }


@asynccontextmanager
async def _body_of(request: web.Request, decoder: BodyDecoder[_T]) -> AsyncIterator[_T]:
    """A request's body, which counts among the bytes of open requests until the block ends.

    Raises:
        ApiError: 429, there are too many; or it is none that can be read.
    """
    context = request.app[CONTEXT]
    settings = context.settings
    most = settings.max_body_bytes
    num_bytes = most if request.content_length is None else min(request.content_length, most)
    refusal = context.admission.hold_bytes(num_bytes)
    if refusal is not None:
        raise refusal_error(refusal)
    try:
        yield await decoder.read(request, max_bytes=most, timeout_s=settings.body_timeout_s)
    finally:
        context.admission.let_go_of_bytes(num_bytes)


async def handle_tokenize(http_request: web.Request) -> web.Response:
    """Token ids of a text or of a conversation."""
    async with _body_of(http_request, _TOKENIZE) as request:
        return await _tokenize(http_request.app[CONTEXT], request)


async def _tokenize(context: GatewayContext, request: TokenizeRequest) -> web.Response:
    settings, engine = context.settings, context.engine
    context.model_name(request.model)
    try:
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequestError("send either prompt or messages", param="prompt")
        if request.messages is not None:
            prompt: str | ChatPrompt = chat_prompt(
                request.messages,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                template_kwargs=request.chat_template_kwargs or {},
                max_messages=settings.max_messages,
                add_special_tokens=bool(request.add_special_tokens),
            )
            tokens = await engine.tokenize(prompt)
        else:
            tokens = await engine.tokenize(request.prompt or "", request.add_special_tokens is not False)
    except OctavoError as error:
        raise from_public_error(error) from None
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens}
    answer["token_strs"] = None
    if request.return_token_strs:  # beside the loop: there may be a million of them
        answer["token_strs"] = await asyncio.to_thread(list, map(engine.token_text, tokens))
    return json_response(answer)


async def handle_detokenize(http_request: web.Request) -> web.Response:
    """Text of token ids."""
    async with _body_of(http_request, _DETOKENIZE) as request:
        return await _detokenize(http_request.app[CONTEXT], request)


async def _detokenize(context: GatewayContext, request: DetokenizeRequest) -> web.Response:
    engine = context.engine
    context.model_name(request.model)
    if request.tokens and max(request.tokens) >= engine.vocab_size:
        raise ApiError(
            400,
            f"tokens holds id {max(request.tokens)}, but the model's are 0 to {engine.vocab_size - 1}",
            param="tokens",
            code="invalid_request",
        )
    try:
        text = await engine.detokenize(request.tokens)
    except OctavoError as error:
        raise from_public_error(error) from None
    return json_response({"prompt": text})


async def handle_health(request: web.Request) -> web.Response:
    """200 only if a chat sent now would be answered: the engine is there, steps run, and the server is not ending."""
    why = request.app[CONTEXT].why_not_ready()
    if not why:
        return web.json_response({"status": "ok"}, headers=_HEALTH_HEADERS)
    raise ApiError(503, f"not ready: {why}", code="not_ready", headers={"Retry-After": "1", **_HEALTH_HEADERS})


async def handle_live(request: web.Request) -> web.Response:
    """200 as long as the process answers at all, unless its engine is beyond repair and only a new start helps."""
    context = request.app[CONTEXT]
    if context.is_broken:
        why = context.engine.why_not_ready
        raise ApiError(503, f"broken: {why}", code="engine_broken", headers=dict(_HEALTH_HEADERS))
    return web.json_response({"status": "ok"}, headers=_HEALTH_HEADERS)


async def handle_version(request: web.Request) -> web.Response:
    """The package's version."""
    return json_response({"version": importlib.metadata.version("octavo")})


async def handle_metrics(request: web.Request) -> web.Response:
    """Prometheus' text format."""
    context = request.app[CONTEXT]
    return web.Response(
        body=await context.metrics_text(), headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
    )


async def handle_load(request: web.Request) -> web.Response:
    """How much is going on, for load balancers."""
    context = request.app[CONTEXT]
    return json_response({"server_load": await context.server_load()})
