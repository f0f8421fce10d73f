"""Connections below HTTP: how many there may be, and what is told to a client that has closed its sending half.

A client may send its request, close its sending half and go on to read; one that is gone altogether has sent just the
same. Which of the two it is shows only when something is written to it: the kernel of one that is gone answers with a
reset. So a byte is written at once that the response would have to contain anyway, and the socket is watched.
"""

from __future__ import annotations

import asyncio
import ipaddress
import select
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

from aiohttp.http import StreamWriter

from .http_errors import ApiError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Refusal = Literal["all", "client"]

REFUSAL_S: Final = 1.0
"""How long a refused client has to send its request and take its answer."""
MAX_REFUSALS: Final = 256
"""Refused connections that are told why; more at a time are just closed."""
_BEGINNING: Final = b"HTTP/"
_LEADING_ZERO: Final = b"0"


class ResponseWriter(StreamWriter):
    """Can find out whether anybody is there to read, without a byte too many."""

    _has_begun = False
    _is_ending = False

    def probe(self) -> None:
        """Write something that belongs to the response, if there is something that is known by now.

        That is the first word of the status line, or headers that wait for the first chunk, or a leading zero of the
        next chunk's size.
        """
        transport = self.transport
        if transport is None or transport.is_closing() or self._is_ending:
            return
        if self._headers_written:
            if self.chunked:
                transport.write(_LEADING_ZERO)
        elif self._headers_buf:
            self.send_headers()
        elif not self._has_begun:
            self._has_begun = True
            transport.write(_BEGINNING)

    async def write_headers(self, status_line: str, headers: Any) -> None:
        """As the library's, without what was written before."""
        if self._has_begun:
            status_line = status_line.removeprefix(_BEGINNING.decode())
        await super().write_headers(status_line, headers)

    async def write_eof(self, chunk: bytes = b"") -> None:
        self._is_ending = True
        await super().write_eof(chunk)


class HangupWatch:
    """Tells when a socket from which nothing more can be read is closed for writing too.

    The event loop does not look at such a socket until something is written. Where the system has no epoll
    `is_available` is false.
    """

    def __init__(self) -> None:
        self._epoll: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._callbacks: dict[int, Callable[[], None]] = {}

    @property
    def is_available(self) -> bool:
        return hasattr(select, "epoll")

    def watch(self, fd: int, on_hangup: Callable[[], None]) -> None:
        """Call `on_hangup` once, on the event loop; `forget` it before the socket is closed."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._epoll.fileno(), self._look)
        # No event is asked for; hang-ups and errors are reported all the same.
        if fd not in self._callbacks:
            self._epoll.register(fd, 0)
        self._callbacks[fd] = on_hangup

    def forget(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self) -> None:
        if self._epoll is not None:
            assert self._loop is not None
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
            self._callbacks.clear()

    def _look(self) -> None:
        for fd, _ in self._epoll.poll(0):
            on_hangup = self._callbacks.get(fd)
            self.forget(fd)
            if on_hangup is not None:
                on_hangup()


class ConnectionTable:
    """Counts connections, and says which are too many.

    Args:
        max_total: open at a time; 0 for no bound.
        max_per_client: open at a time from one address (IPv6: from one /64 network); 0 for no bound.
        trusted_proxies: addresses or networks that many clients stand behind: only the total bounds these.

    Attributes:
        num_open: connections that were admitted and are open.
        num_refused: how many were not, by the bound they met.
        num_refusing: refused connections that are being told so.
    """

    def __init__(self, *, max_total: int, max_per_client: int, trusted_proxies: Iterable[str] = ()) -> None:
        self.num_open = 0
        self.num_refused: dict[Refusal, int] = {"all": 0, "client": 0}
        self.num_refusing = 0
        self.hangups = HangupWatch()
        self._max_total = max_total
        self._max_per_client = max_per_client
        self._trusted: list[Network] = [ipaddress.ip_network(text, strict=False) for text in trusted_proxies]
        self._by_client: Counter[str] = Counter()

    def admit(self, address: str) -> Refusal | None:
        """Count a connection from `address` (see `peer_address`); or say which bound forbids it, and count that."""
        client = _client(address)
        refusal: Refusal | None = None
        if self._max_total and self.num_open >= self._max_total:
            refusal = "all"
        elif self._max_per_client and self._by_client[client] >= self._max_per_client and not self._trusts(address):
            refusal = "client"
        if refusal is not None:
            self.num_refused[refusal] += 1
            return refusal
        self.num_open += 1
        self._by_client[client] += 1
        return None

    def release(self, address: str) -> None:
        """A connection that was admitted is closed."""
        client = _client(address)
        self.num_open -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]

    def _trusts(self, address: str) -> bool:
        if not self._trusted or not address:
            return False
        parsed = ipaddress.ip_address(address)
        return any(parsed in network for network in self._trusted if network.version == parsed.version)


def peer_address(transport: asyncio.BaseTransport) -> str:
    """The address at the other end, an IPv4 one even if it came in as IPv6; empty for a Unix socket."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple) or not peer:
        return ""
    host = str(peer[0]).partition("%")[0]
    if ":" not in host:
        return host
    mapped = ipaddress.IPv6Address(host).ipv4_mapped
    return host if mapped is None else str(mapped)


def _client(address: str) -> str:
    """Whom an address stands for: an IPv6 host has as many as it likes in its /64 network."""
    return str(ipaddress.IPv6Network((address, 64), strict=False)) if ":" in address else address


_REFUSALS: Final[dict[Refusal, ApiError]] = {
    "all": ApiError(
        503,
        "the server has as many connections as it may: try again later",
        code="too_many_connections",
        headers={"Retry-After": "5"},
    ),
    "client": ApiError(
        429,
        "there are as many connections from this address as there may be: reuse those that are open",
        code="too_many_connections",
        headers={"Retry-After": "5"},
    ),
}


class RefusedConnection(asyncio.Protocol):
    """Takes a connection over that was not admitted: answers its first request, or closes it soon."""

    def __init__(self, table: ConnectionTable, refusal: Refusal) -> None:
        self._table = table
        self._answer = raw_response(_REFUSALS[refusal])
        self._is_answered = False
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._table.num_refusing += 1
        if self._table.num_refusing > MAX_REFUSALS:
            transport.abort()
        else:
            self._timer = asyncio.get_running_loop().call_later(REFUSAL_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        # What is left unread when a socket is closed resets it, and the answer might be lost: read, and throw away.
        if self._is_answered or self._transport is None or self._transport.is_closing():
            return
        self._is_answered = True
        self._transport.write(self._answer)
        self._transport.write_eof()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._table.num_refusing -= 1
        if self._timer is not None:
            self._timer.cancel()


def raw_response(error: ApiError) -> bytes:
    """An error as bytes of HTTP/1.1, for a connection that has no request; it closes the connection."""
    response = error.response()
    body = error.body()
    lines = [f"HTTP/1.1 {response.status} {response.reason}"]
    headers = {**response.headers, "Server": "octavo", "Content-Length": str(len(body)), "Connection": "close"}
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
