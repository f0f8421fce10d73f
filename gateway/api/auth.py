"""Who may call what: API keys, browser origins, host names. Whatever is not on the open list needs a key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from .http_errors import ApiError

OPEN_PATHS: Final = frozenset({"/", "/health", "/ping", "/ready", "/live", "/version", "/metrics"})
"""Routes that answer without a key; everything else, known or not, asks for one."""

ALLOWED_METHODS: Final = "GET, POST, OPTIONS"
ALLOWED_HEADERS: Final = "Authorization, Content-Type, X-Request-Id, Last-Event-ID"


class KeyRing:
    """API keys, kept as digests and compared in constant time.

    Args:
        keys: any of these opens; none at all means that no key is asked for.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, request: web.Request) -> None:
        """Let a request pass, or not.

        The decision hangs on the route that was matched, never on the URL as it was written.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return
        resource = request.match_info.route.resource
        if resource is not None and resource.canonical in OPEN_PATHS:
            return
        given = request.headers.getall("Authorization", [])
        if not self.opens(given[0] if len(given) == 1 else ""):
            raise ApiError(
                401,
                "a valid API key is needed: send the header `Authorization: Bearer <key>`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def opens(self, authorization: str) -> bool:
        """Whether a header `Authorization` carries one of the keys, or none is asked for."""
        if not self._digests:
            return True
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip().encode("utf-8", "surrogateescape"))
        # Every key is compared, so that the time tells nothing about which one came close.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == "bearer"


def is_host_allowed(host: str, allowed_hosts: Sequence[str]) -> bool:
    """Whether a header `Host` is none that a foreign page may have bound to this machine's address.

    Args:
        allowed_hosts: names in lower case; `*` is any, and none at all means that nobody asks.
    """
    if not allowed_hosts or "*" in allowed_hosts:
        return True
    name = _host_name(host)
    return name in allowed_hosts or name.endswith(".localhost") or _is_address(name)


def check_host(request: web.Request, allowed_hosts: Sequence[str]) -> None:
    """Refuse host names as `is_host_allowed` has it. Without a name, as in HTTP/1.0, it is no browser that asks.

    Raises:
        ApiError: 403.
    """
    host = request.headers.get("Host")
    if host is None or is_host_allowed(host, allowed_hosts):
        return
    raise ApiError(
        403,
        "this host name is not served here: use the address, or add the name to the allowed hosts",
        code="host_not_allowed",
    )


def check_origin(request: web.Request, allowed_origins: Sequence[str]) -> None:
    """Refuse calls by browser pages of other sites, unless they were let in.

    Raises:
        ApiError: 403.
    """
    origin = request.headers.get("Origin")
    if origin is None or origin in allowed_origins or "*" in allowed_origins:
        return
    try:
        netloc = urlsplit(origin).netloc
    except ValueError:
        netloc = ""
    if netloc and netloc.lower() == request.headers.get("Host", "").lower():
        return
    raise ApiError(403, "pages from this origin may not call: add it to the allowed origins", code="origin_not_allowed")


def cors_headers(request: web.Request, allowed_origins: Sequence[str]) -> dict[str, str]:
    """What tells a browser that a page may read the answer; nothing if it may not."""
    origin = request.headers.get("Origin")
    if origin is None or not (origin in allowed_origins or "*" in allowed_origins):
        return {}
    return {
        "Access-Control-Allow-Origin": "*" if "*" in allowed_origins else origin,
        "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
        "Vary": "Origin",
    }


def preflight_response(request: web.Request, allowed_origins: Sequence[str]) -> web.Response | None:
    """The answer to a browser that asks whether it may call; None if this is no such question."""
    headers = cors_headers(request, allowed_origins)
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers or not headers:
        return None
    headers["Access-Control-Allow-Methods"] = ALLOWED_METHODS
    headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
    headers["Access-Control-Max-Age"] = "600"
    return web.Response(status=204, headers=headers)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host_name(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name = host.rpartition(":")[0] if ":" in host else host
    return name.removesuffix(".")


@lru_cache(maxsize=256)  # clients of a server call it by few names, and refusals should cost little
def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
