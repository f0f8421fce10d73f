"""The API's description, made from the very types that decode it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import msgspec
from aiohttp import web

from .auth import OPEN_PATHS
from .context import CONTEXT
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .respond import json_response

_BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_ERROR = {
    "description": "What is wrong, and what to change.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": "string"},
                        },
                    }
                },
            }
        }
    },
}


async def handle_openapi(request: web.Request) -> web.Response:
    """OpenAPI 3.1, of the routes that this server has."""
    needs_key = bool(request.app[CONTEXT].settings.api_keys)
    return json_response(describe(request.app.router, needs_key=needs_key))


def describe(router: web.UrlDispatcher, *, needs_key: bool) -> dict[str, Any]:
    """The document for a router."""
    kinds = list(_BODIES.values())
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(_BODIES, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in router.routes():
        resource = route.resource
        if resource is None or route.method not in ("GET", "POST"):
            continue
        path = resource.canonical
        summary = (route.handler.__doc__ or "").strip().partition("\n")[0]
        operation: dict[str, Any] = {
            "operationId": route.handler.__name__.removeprefix("handle_"),
            "summary": summary,
            "responses": {"200": {"description": "The answer."}, "4XX": _ERROR, "5XX": _ERROR},
        }
        if "{" in path:
            name = path[path.index("{") + 1 : path.index("}")]
            operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
        if path in schema_of:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": schema_of[path]}},
            }
        if needs_key and path not in OPEN_PATHS:
            operation["security"] = [{"bearer": []}]
        paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "octavo", "version": importlib.metadata.version("octavo")},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }
