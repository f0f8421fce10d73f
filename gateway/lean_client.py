"""A client that costs next to nothing: for a benchmark that shares its machine with the server it measures.

Every answer's arrival is also known by the system's own stamp, made as its bytes reach the client's socket: what the
client's program adds to it, which waits for a processor like everybody else, is no time of the server's.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import sys
import time
from typing import Final
from urllib.parse import urlsplit

import msgspec

from ..messages.errors import OctavoError

_SO_TIMESTAMPNS: Final = 35  # Linux; Python has no name for it
_TIMESPEC: Final = struct.Struct("qq")
_ANCILLARY_BYTES: Final = 64
_READ_BYTES: Final = 256 * 1024
_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)


class ConnectionBrokenError(OctavoError):
    """A connection ended before the answer to its request."""

    code = "connection_broken"


class LeanAnswer(msgspec.Struct, frozen=True):
    """An answer.

    Attributes:
        head_s: from sending the request until its first bytes had been read here.
        arrival_s: the same until they were at this machine's socket; None where the system does not say.
        has_retry_after: whether it says, as a number, when to come back.
    """

    status: int
    body: bytes
    head_s: float
    arrival_s: float | None
    has_retry_after: bool


class LeanClient:
    """Sends prepared requests over connections that are used again.

    Args:
        base_url: of the server, with `http`.
        api_key: to send.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        url = urlsplit(base_url.rstrip("/").removesuffix("/v1"))
        if url.scheme != "http" or not url.hostname:
            raise OctavoError(f"{base_url}: this client speaks plain HTTP only: give it http://HOST:PORT")
        self._prefix = url.path
        self._address = (url.hostname, url.port or 80)
        self._fields = f"Host: {url.netloc.rpartition('@')[2]}\r\n"
        if api_key:
            self._fields += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[_Connection] = []
        self._open: dict[_Connection, None] = {}

    async def request(self, method: str, path: str, body: bytes = b"") -> LeanAnswer:
        """Send a request, with JSON if there is a body, and wait for the answer.

        Raises:
            OSError: nobody listens, or the connection broke.
            ConnectionBrokenError: it was closed before there was an answer.
        """
        request = (
            f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._fields}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:  # the server may have closed it while it was idle
                break
        else:
            connection = await self._connect()
        try:
            answer = await connection.ask(request)
        except BaseException:
            self._open.pop(connection, None)
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        else:
            self._open.pop(connection, None)
        return answer

    def close(self) -> None:
        for connection in self._open:
            connection.close()
        self._open.clear()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        (family, kind, protocol, _, address), *_ = await loop.getaddrinfo(*self._address, type=socket.SOCK_STREAM)
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sys.platform == "linux":
                sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        except BaseException:
            sock.close()
            raise
        connection = _Connection(loop, sock)
        self._open[connection] = None
        return connection


class _Connection:
    """One request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self.is_open = True
        self._loop = loop
        self._sock = sock
        self._answer: asyncio.Future[LeanAnswer] | None = None
        self._sent_ns = self._sent_wall_ns = 0
        self._head_s = 0.0
        self._arrival_s: float | None = None
        self._data = b""
        loop.add_reader(sock.fileno(), self._read)

    async def ask(self, request: bytes) -> LeanAnswer:
        self._data = b""
        self._answer = self._loop.create_future()
        # The wall clock, too: the system's stamps are of that one.
        self._sent_ns, self._sent_wall_ns = time.monotonic_ns(), time.time_ns()
        try:
            num_sent = self._sock.send(request)
        except BlockingIOError:
            num_sent = 0
        if num_sent < len(request):
            await self._loop.sock_sendall(self._sock, request[num_sent:])
        return await self._answer

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _read(self) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if not data or self._answer is None or self._answer.done():
            self._fail(ConnectionBrokenError("the server closed the connection without an answer"))
            return
        if not self._data:
            self._head_s = (time.monotonic_ns() - self._sent_ns) * 1e-9
            self._arrival_s = self._stamp_s(ancillary)
        self._data += data
        self._look(self._answer)

    def _stamp_s(self, ancillary: list[tuple[int, int, bytes]]) -> float | None:
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(value) >= _TIMESPEC.size:
                seconds, nanoseconds = _TIMESPEC.unpack_from(value)
                # A wall clock that was set in between gives nonsense; the program's own time is an upper bound.
                stamp_s = float(seconds * 1_000_000_000 + nanoseconds - self._sent_wall_ns) * 1e-9
                return min(max(0.0, stamp_s), self._head_s)
        return None

    def _look(self, answer: asyncio.Future[LeanAnswer]) -> None:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._data[: end + 2]
        status, length = _STATUS.match(head), _LENGTH.search(head)
        if status is None or length is None:
            self._fail(ConnectionBrokenError(f"this is not an answer with a length: {head[:200]!r}"))
            return
        body = self._data[end + 4 :]
        if len(body) < int(length[1]):
            return
        self._answer = None
        if _CLOSE.search(head) is not None:
            self.close()
        has_retry_after = _RETRY_AFTER.search(head) is not None
        answer.set_result(LeanAnswer(int(status[1]), body, self._head_s, self._arrival_s, has_retry_after))

    def _fail(self, error: Exception) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self._answer = None
