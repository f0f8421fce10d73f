"""Refusals that cost next to nothing: told from a request's head, before anybody parses or reads the rest.

Under overload nearly every request is refused, and what a refusal costs is taken from those that are answered. The HTTP
library spends some 0.4 ms on each; from the bytes of a head that holds nothing out of the ordinary it takes a tenth of
that. Whatever is out of the ordinary is left to the library, which refuses it in the same words.
"""

from __future__ import annotations

import re
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp.helpers import rfc822_formatted_time

from .auth import KeyRing, is_host_allowed
from .http_errors import ApiError
from .overload import Refusal

if TYPE_CHECKING:
    import asyncio

    from .context import GatewayContext

MAX_HEAD_BYTES: Final = 8190
"""Of a head; the library's bound for a single line of one."""

MAX_BODY_BYTES: Final = 64 * 1024
"""Of a refused body, which is read and thrown away so that the connection can be used again."""

GENERATION_PATHS: Final = frozenset({"/v1/completions", "/v1/chat/completions"})

_HEAD: Final = re.compile(
    rb"(?P<method>GET|POST) (?P<path>/[!-~]*) HTTP/1\.1\r\n"
    rb"(?P<fields>(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)+)\r\n"
)
_FIELD: Final = re.compile(rb"([^:\r\n]+):[ \t]*([^\r\n]*?)[ \t]*\r\n")
_LENGTH: Final = re.compile(rb"[0-9]{1,9}")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,128}")
# Of these the library knows what they mean for the bytes behind the head, or for the answer.
_UNUSUAL: Final = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"origin", b"content-encoding", b"trailer"})
_SINGLE: Final = frozenset({b"host", b"content-length", b"authorization", b"x-request-id", b"connection"})
_LAST_DATA_RECV: Final = struct.Struct("=52xI")  # of Linux' `struct tcp_info`: ms since something was received


class PlainHead(msgspec.Struct, frozen=True):
    """Head of a request that holds nothing out of the ordinary.

    Attributes:
        fields: header fields by name in lower case; of those that matter here, none comes twice.
        num_bytes: of head and body.
    """

    method: str
    path: str
    fields: Mapping[bytes, bytes]
    num_head_bytes: int
    num_body_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_head_bytes + self.num_body_bytes


def read_head(data: bytes) -> PlainHead | None:
    """The head that `data` begins with; None if it is not whole, or not plain."""
    match = _HEAD.match(data, 0, MAX_HEAD_BYTES)
    if match is None:
        return None
    fields: dict[bytes, bytes] = {}
    for name, value in _FIELD.findall(match["fields"]):
        lower = name.lower()
        if lower in _UNUSUAL or (lower in fields and lower in _SINGLE):
            return None
        fields[lower] = value
    length = fields.get(b"content-length")
    is_bodiless = length is None and match["method"] == b"GET"
    if not is_bodiless and (length is None or _LENGTH.fullmatch(length) is None):
        return None
    if b"host" not in fields or fields.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    return PlainHead(match["method"].decode(), match["path"].decode(), fields, match.end(), int(length or b"0"))


class EarlyRefusals:
    """Answers requests for work that are not let in at the moment.

    Args:
        context: with the admission that decides.
        keys: a client without one is not told how much there is to do.
    """

    def __init__(self, context: GatewayContext, keys: KeyRing) -> None:
        self._context = context
        self._keys = keys
        self._is_counted_in_log = context.settings.log_requests

    def answer(self, head: PlainHead, transport: asyncio.BaseTransport) -> bytes | None:
        """The answer to a request that is refused for lack of room; None if somebody else has to look at it."""
        context = self._context
        if (
            head.method != "POST"
            or head.path not in GENERATION_PATHS
            or head.num_body_bytes > MAX_BODY_BYTES
            or context.is_draining
            or context.tracing is not None
        ):
            return None
        settings = context.settings
        authorization = head.fields.get(b"authorization", b"").decode("utf-8", "surrogateescape")
        if not is_host_allowed(head.fields[b"host"].decode("latin-1"), settings.allowed_hosts) or not self._keys.opens(
            authorization
        ):
            return None
        began_ns = time.monotonic_ns()
        refusal = context.admission.refuse(began_ns, head.num_body_bytes)
        if refusal is None:
            return None
        answer = _render(refusal_error(refusal), refusal.retry_after_s, _request_id(head))
        seconds = (time.monotonic_ns() - began_ns) * 1e-9
        num_answered = len(answer.partition(b"\r\n\r\n")[2])
        context.metrics.http_ended(
            head.path, "POST", 429, seconds, num_asked=head.num_body_bytes, num_answered=num_answered
        )
        context.metrics.refused(since_arrival_s(transport))
        if self._is_counted_in_log:
            context.count_refusal()
        return answer


def refusal_error(refusal: Refusal) -> ApiError:
    """What a client is told that is not let in."""
    return ApiError(
        429,
        f"{refusal.text}: try again in {refusal.retry_after_s} s",
        code="queue_full",
        headers={"Retry-After": str(refusal.retry_after_s)},
    )


def _read_tcp_info(sock: socket.socket) -> float:
    (since_ms,) = _LAST_DATA_RECV.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECV.size))
    return float(since_ms) * 1e-3


def _know_nothing(_sock: socket.socket) -> float:
    return 0.0


_read_age: Callable[[socket.socket], float] = _read_tcp_info if sys.platform == "linux" else _know_nothing


def since_arrival_s(transport: asyncio.BaseTransport) -> float:
    """How long ago the system received the latest bytes of a connection, to a few milliseconds: they may have waited
    long before this process read them. 0 where the system does not say."""
    sock = transport.get_extra_info("socket")
    try:
        return _read_age(sock) if sock is not None else 0.0
    except (OSError, struct.error):
        return 0.0  # a Unix socket, or one that was closed meanwhile


def _request_id(head: PlainHead) -> str:
    asked = head.fields.get(b"x-request-id", b"").decode("latin-1")
    return asked if _REQUEST_ID.fullmatch(asked) else secrets.token_hex(16)


def _render(error: ApiError, retry_after_s: int, request_id: str) -> bytes:
    body = error.body()
    return (
        f"HTTP/1.1 429 Too Many Requests\r\nRetry-After: {retry_after_s}\r\nx-request-id: {request_id}\r\n"
        f"Server: octavo\r\nContent-Length: {len(body)}\r\nContent-Type: application/json\r\n"
        f"Date: {rfc822_formatted_time()}\r\n\r\n"
    ).encode("latin-1") + body
