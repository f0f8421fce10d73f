"""A port on an asyncio event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from ...messages.base import Message
from .port import LinkEvent, Port

log = structlog.get_logger("octavo.port")


class AsyncioPort:
    """Calls back with what a port receives.

    ZeroMQ's descriptor tells of an edge: something came since it was last looked at. So everything is taken at each
    wake-up; a batch cut short is followed by another in the loop's next turn, after the others had theirs.

    Args:
        on_messages: called with `(peer, message)` pairs in order, never with none.
        on_event: called with what happens to links; after the messages that came before.
        on_failure: called once, with the first exception that escapes a callback or the port. Its peers count as taken
            what came with it and was not handled, so nothing is read any more: whoever owns this ends, or begins anew.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        port: Port,
        on_messages: Callable[[list[tuple[str, Message]]], None],
        on_event: Callable[[LinkEvent], None] | None = None,
        *,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.port = port
        self._loop = loop
        self._on_messages = on_messages
        self._on_event = on_event
        self._on_failure = on_failure
        self._next_turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        loop.add_reader(port.fileno(), self._read)
        self._next_turn = loop.call_soon(self._read)  # what came before nobody would announce

    def close(self) -> None:
        """Stop calling back; the port stays open."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self.port.fileno())
        for handle in (self._next_turn, self._timer):
            if handle is not None:
                handle.cancel()

    def send(self, peer: str, message: Message) -> bool:
        """`Port.send`; what it learnt about links on the way is told in the loop's next turn."""
        is_sent = self.port.send(peer, message)
        if self.port.events:
            self._call_soon()
        return is_sent

    def _call_soon(self) -> None:
        if self._next_turn is None and not self._is_closed:
            self._next_turn = self._loop.call_soon(self._read)

    def _read(self) -> None:
        try:
            self._carry()
        except Exception as error:
            self.close()
            log.error("port.failed", port=self.port.name, exc_info=error)
            self._on_failure(error)

    def _carry(self) -> None:
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        port = self.port
        messages = port.receive()
        if port.has_more:
            self._call_soon()
        delay_ms = port.delay_ms()
        if delay_ms is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(delay_ms / 1000, self._read)
        if messages:
            self._on_messages(messages)
        while port.events and not self._is_closed:
            event = port.events.popleft()
            if self._on_event is not None:
                self._on_event(event)


def attach(
    loop: asyncio.AbstractEventLoop,
    port: Port,
    on_messages: Callable[[list[tuple[str, Message]]], None],
    on_event: Callable[[LinkEvent], None] | None = None,
    *,
    on_failure: Callable[[Exception], None] | None = None,
) -> AsyncioPort:
    """Tie a port to a loop until the result's `close`; without `on_failure` the loop's exception handler is told."""
    return AsyncioPort(loop, port, on_messages, on_event, on_failure=on_failure or _raise)


def _raise(error: Exception) -> None:
    raise error
