"""Server-sent events without a task per stream: one pump writes what all streams gained, and waits for none of them.

Between two turns of the event loop a stream's chunks gather and leave in one write, so that the cost per token falls
when the server is busy. A client that does not read is measured by what lies unsent for it; past a bound, or after a
time, it is cut off, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web
from aiohttp.http import StreamWriter

DONE: Final = b"data: [DONE]\n\n"
STALL_CHECK_S: Final = 1.0
SEND_BUFFER_BYTES: Final = 256 * 1024

_LINE_SEPARATORS: Final = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\x85".encode(), b"\\u0085"),
)

# The line before a chunk of HTTP's chunked coding, for the sizes that events of one token have.
_SIZE_LINES: Final = tuple(b"%x\r\n" % size for size in range(2048))
_LINE_END: Final = b"\r\n"

_encode = msgspec.json.Encoder().encode
_join = b"".join


def json_text(text: str) -> bytes:
    """A text as a JSON string that is one line by anybody's idea of lines (some clients split at U+2028 too)."""
    encoded = _encode(text)
    return encoded if text.isascii() else _without_line_separators(encoded)


def json_line(value: Any) -> bytes:
    """Any value as JSON that is one line in the same sense."""
    encoded = _encode(value)
    return encoded if encoded.isascii() else _without_line_separators(encoded)


def _without_line_separators(encoded: bytes) -> bytes:
    for separator, escaped in _LINE_SEPARATORS:
        encoded = encoded.replace(separator, escaped)
    return encoded


class EventSink(Protocol):
    """Where a response's events go; none of these waits."""

    def write(self, event: bytes) -> None:
        """Add a whole event."""

    def write_text(self, head: bytes, text: str, tail: bytes) -> int:
        """Add the event `head + json_text(text) + tail`, unless the text is empty.

        Returns:
            When this counts as written, monotonic ns.
        """


class StreamPump:
    """Writes the gathered chunks of all streams, once each turn of the event loop.

    Args:
        buffer_bytes: unsent bytes of a stream before it counts as stalled; it may park as many again.
        stall_s: how long a stream may be stalled.

    Attributes:
        turn_ns: monotonic time at which the first event of this turn came, and for which all of them count; 0 between
            the turns. Streams that go in step read one clock, once.
        dirty: streams to be written to at the end of this turn, which `turn_ns` says is to come.
    """

    def __init__(self, *, buffer_bytes: int, stall_s: float) -> None:
        self.buffer_bytes = buffer_bytes
        self.stall_s = stall_s
        self.num_shed = 0
        self.num_open = 0
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self.turn_ns = 0
        self.dirty: list[EventStream] = []
        self._stalled: dict[EventStream, float] = {}
        self._check: asyncio.TimerHandle | None = None

    def opened(self) -> None:
        self.num_open += 1
        self._all_closed.clear()

    def closed(self) -> None:
        self.num_open -= 1
        if not self.num_open:
            self._all_closed.set()

    async def wait_closed(self) -> None:
        """Until no stream is open."""
        await self._all_closed.wait()

    def begin_turn(self) -> int:
        """See to it that this turn has an end, in which the dirty streams are written to; returns `turn_ns`."""
        if not self.turn_ns:
            asyncio.get_running_loop().call_soon(self._flush)
            self.turn_ns = time.monotonic_ns()
        return self.turn_ns

    def stall(self, stream: EventStream) -> None:
        """Keep an eye on a stream that cannot be written to."""
        loop = asyncio.get_running_loop()
        self._stalled.setdefault(stream, loop.time())
        if self._check is None:
            self._check = loop.call_later(min(STALL_CHECK_S, self.stall_s), self._check_stalled)

    def forget(self, stream: EventStream) -> None:
        self._stalled.pop(stream, None)

    def _flush(self) -> None:
        self.turn_ns = 0
        dirty, self.dirty = self.dirty, []
        for stream in dirty:
            stream.flush()

    def _check_stalled(self) -> None:
        self._check = None
        loop = asyncio.get_running_loop()
        for stream, since in list(self._stalled.items()):
            stream.flush()
            if stream in self._stalled and loop.time() - since >= self.stall_s:
                stream.shed()
        if self._stalled:
            self._check = loop.call_later(min(STALL_CHECK_S, self.stall_s), self._check_stalled)


class EventResponse(web.StreamResponse):
    """A response whose headers wait for the first chunk: the library sends other streams' on their own."""

    _send_headers_immediately = False


class EventStream:
    """One open response of server-sent events.

    Args:
        pump: shared by all streams.
        on_lost: called once if the client is gone or was cut off.
    """

    __slots__ = (
        "_has_sent_headers",
        "_is_chunked",
        "_is_dirty",
        "_is_lost",
        "_is_stalled",
        "_on_lost",
        "_parked",
        "_parked_bytes",
        "_pump",
        "_request",
        "_response",
        "_transport",
        "_writer",
        "num_writes",
    )

    def __init__(self, pump: StreamPump, on_lost: Callable[[], None]) -> None:
        self._pump = pump
        self._on_lost = on_lost
        self._parked: list[bytes] = []  # whole HTTP chunks where there are such and the headers have left
        self._parked_bytes = 0
        self.num_writes = 0
        self._is_dirty = False
        self._is_lost = False
        self._is_stalled = False
        self._has_sent_headers = False
        self._is_chunked = False
        self._request: web.Request | None = None
        self._response: web.StreamResponse | None = None
        self._writer: StreamWriter | None = None
        self._transport: asyncio.Transport | None = None

    async def open(self, request: web.Request, response: EventResponse) -> None:
        """Begin the response; its headers leave at the end of this turn of the loop, with what is written by then.

        Raises:
            ConnectionError: the client is gone.
        """
        if request.transport is not None:
            _bound_send_buffer(request.transport)
        writer = await response.prepare(request)
        assert isinstance(writer, StreamWriter), writer
        self._request, self._response, self._writer = request, response, writer
        self._transport = writer.transport
        self._pump.opened()
        self._mark()

    def write(self, event: bytes) -> None:
        """Add a whole event; never waits."""
        if self._is_lost:
            return
        if self._is_chunked:
            event = b"%x\r\n%b\r\n" % (len(event), event)
        self._parked.append(event)
        self._parked_bytes += len(event)
        if self._writer is not None:
            self._mark()

    def write_text(self, head: bytes, text: str, tail: bytes) -> int:
        """Add the event `head + json_text(text) + tail`, unless the text is empty; only once it is open.

        Returns:
            When this counts as written, monotonic ns.

        Nearly every token comes this way, so what `write` and `json_text` do is done here without calling them
        (measured by `python -m octavo.gateway.bench_streams`).
        """
        pump = self._pump
        now_ns = pump.turn_ns or pump.begin_turn()
        if text and not self._is_lost:
            encoded = _encode(text)
            if not text.isascii():
                encoded = _without_line_separators(encoded)
            if self._is_chunked:
                size = len(head) + len(encoded) + len(tail)
                size_line = _SIZE_LINES[size] if size < len(_SIZE_LINES) else b"%x\r\n" % size
                event = _join((size_line, head, encoded, tail, _LINE_END))
            else:
                event = _join((head, encoded, tail))
            self._parked.append(event)
            self._parked_bytes += len(event)
            if not self._is_dirty:
                self._is_dirty = True
                pump.dirty.append(self)
        return now_ns

    def flush(self) -> None:
        """Hand what is parked to the transport, if it has room."""
        self._is_dirty = False
        transport = self._transport
        if transport is None or self._is_lost:
            return
        if transport.is_closing():
            self._lose()
            return
        if transport.get_write_buffer_size() > self._pump.buffer_bytes:
            if self._parked_bytes > self._pump.buffer_bytes:
                self.shed()
            else:
                self._is_stalled = True
                self._pump.stall(self)
            return
        if self._is_stalled:
            self._is_stalled = False
            self._pump.forget(self)
        if not self._parked and self._has_sent_headers:
            return
        self.num_writes += 1
        if self._has_sent_headers:
            transport.write(self._take())
        else:
            self._send_first()

    def _send_first(self) -> None:
        """The headers and what is parked in one write; from now on this stream makes the chunks of HTTP itself."""
        assert self._writer is not None
        self._has_sent_headers = True
        _run_now(self._writer.write(self._take(), drain=False))
        self._is_chunked = self._writer.chunked

    def _mark(self) -> None:
        if not self._is_dirty:
            self._is_dirty = True
            self._pump.begin_turn()
            self._pump.dirty.append(self)

    async def close(self) -> None:
        """Write what is left and the end of the response; a client that does not take it is cut off."""
        if self._response is None or self._is_lost:
            return
        try:
            async with asyncio.timeout(self._pump.stall_s):
                if self._has_sent_headers and self._parked and self._transport is not None:
                    self._transport.write(self._take())
                self._has_sent_headers = True  # they leave now, if they have not
                await self._response.write_eof(self._take())
        except TimeoutError:
            self.shed()
        except ConnectionError:
            self._lose()

    def release(self) -> None:
        """The response is over, one way or the other."""
        self._pump.forget(self)
        if self._writer is not None:
            self._pump.closed()
            self._writer = self._transport = None
        self._is_lost = True
        self._parked.clear()

    def shed(self) -> None:
        """Cut off a client that does not read."""
        self._pump.num_shed += 1
        if self._request is not None and self._request.transport is not None:
            self._request.transport.abort()
        self._lose()

    def _take(self) -> bytes:
        parked = self._parked
        data = parked[0] if len(parked) == 1 else b"".join(parked)
        parked.clear()
        self._parked_bytes = 0
        return data

    def _lose(self) -> None:
        self._pump.forget(self)
        if not self._is_lost:
            self._is_lost = True
            self._parked.clear()
            self._on_lost()


def _run_now(write: Coroutine[Any, Any, None]) -> None:
    # Without draining a write never waits; its coroutine ends at the first step, and needs no task.
    try:
        write.send(None)
    except StopIteration:
        return
    except ConnectionError:
        return
    raise RuntimeError("a write that must not wait did")


def _bound_send_buffer(transport: asyncio.BaseTransport) -> None:
    # The kernel would grow its buffer to megabytes for a client that does not read, and hide it from us.
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
