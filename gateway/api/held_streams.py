"""Streams whose events are numbered and kept for a while, so that a client that lost its connection, or its server,
goes on where it was.

Events are numbered per choice: a choice's events come in the same order whenever its stream is generated, but how those
of several choices interleave is chance. An event's id says how many of each choice were sent so far: `<id>:17`, or
`<id>:17.15` with two choices. What comes after all choices (usage, the end mark) counts to the first.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import zip_longest
from typing import Final

import msgspec
import structlog
from aiohttp import web

from ...messages.request import TextDelta
from .choice import Choice
from .exchange import ChunkSink, Exchange
from .http_errors import ApiError
from .sse import EventSink, EventStream, StreamPump, json_text
from .stream_journal import StreamJournal, StreamRecord

log = structlog.get_logger("octavo.streams")

LAST_EVENT_ID: Final = "Last-Event-ID"
MAX_CHOICES: Final = 64
"""Of a stream that is held: each event's id has a number for each."""

_EVENT_ID: Final = re.compile(r"([!-~]{1,300}):(\d{1,12}(?:\.\d{1,12}){0,1023})")


class HoldLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much is held.

    Attributes:
        grace_s: a stream whose client is gone goes on for so long; then it is cancelled.
        hold_s: a finished stream is kept for so long, for a client that did not get what was sent last; and one that
            was taken up after a start of the server goes on for so long, for a client that may not know of it yet.
        max_stream_bytes: of one stream's events; beyond it the oldest are dropped, and can be had no more.
        max_finished_bytes: of all finished streams; beyond it the oldest are dropped.
        note_s: a stream's first event waits for so long, at most, for a disk to take the note of it.
    """

    grace_s: float = 30.0
    hold_s: float = 300.0
    max_stream_bytes: int = 8 * 1024 * 1024
    max_finished_bytes: int = 64 * 1024 * 1024
    note_s: float = 5.0


class EventPosition(msgspec.Struct, frozen=True):
    """What a client has had: of which stream, and how many events of each choice."""

    response_id: str
    counts: tuple[int, ...] = ()


def last_event(request: web.Request) -> EventPosition | None:
    """What the header `Last-Event-ID` says; None if there is none.

    Raises:
        ApiError: 400, it is not an id that this server gave.
    """
    text = request.headers.get(LAST_EVENT_ID)
    if not text:
        return None
    found = _EVENT_ID.fullmatch(text)
    if found is None:
        raise ApiError(
            400,
            f"{LAST_EVENT_ID} must be the id of an event as this server gave it, <response id>:<number>",
            param=LAST_EVENT_ID,
            code="invalid_event_id",
        )
    return EventPosition(found.group(1), tuple(map(int, found.group(2).split("."))))


def owner_of(request: web.Request) -> str:
    """A digest of the credentials of a request: who may have a stream's events is who asked for it."""
    return hashlib.sha256(request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")).hexdigest()[:32]


class HeldStream:
    """One streamed response: numbers its events, keeps them, and writes them to its client if there is one.

    Args:
        streams: all of them.
        record: what it is the answer to.
        exchange: what generates it.

    Attributes:
        is_finished: every event is there.
        is_failed: it ended with an error, which has no number: generated again, it may go on.
        num_readers: responses, those on their way included, that tell of it.
    """

    def __init__(self, streams: HeldStreams, record: StreamRecord, exchange: Exchange) -> None:
        self.record = record
        self.exchange = exchange
        self.num_bytes = 0
        self.is_finished = False
        self.is_failed = False
        self.expiry: asyncio.TimerHandle | None = None
        self.following = ExitStack()  # left when nobody reads any more
        self.num_readers = 0
        self._streams = streams
        self._pump = streams.pump
        self._max_bytes = streams.limits.max_stream_bytes
        self._id_line = b"id: " + record.response_id.encode() + b":"
        self._events: deque[tuple[int, bytes]] = deque()  # (choice, event), the oldest first
        self._counts: list[int] = [0]  # events of each choice
        self._dropped: list[int] = [0]  # those of them that are no longer kept
        self._skipped: list[int] = [0]  # events of each choice that the client has had elsewhere
        self._choice = 0
        self._is_released = False
        self._may_go_on = False
        self._is_doubted = record.num_attempts > 0
        self._error = b""
        self._client: EventStream | None = None
        self._over: asyncio.Future[None] | None = None
        self._noted: asyncio.Future[None] | None = None

    # ---- what is written ----

    def write(self, event: bytes) -> None:
        """Add an event of the choice whose delta is being told."""
        if self.is_failed:
            self._error += event
            if self._client is not None:
                self._client.write(event)
            return
        self._add(self._choice, event)

    def write_text(self, head: bytes, text: str, tail: bytes) -> int:
        """Add the event `head + json_text(text) + tail`, unless the text is empty."""
        return self.write_choice_text(self._choice, head, text, tail)

    def write_choice_text(self, choice: int, head: bytes, text: str, tail: bytes) -> int:
        """The same for a choice by its index; returns when it counts as written, monotonic ns."""
        now_ns = self._pump.turn_ns or (self._pump.begin_turn() if self._client is not None else time.monotonic_ns())
        if text:
            self._add(choice, b"".join((head, json_text(text), tail)))
        return now_ns

    def chunks(self, make_chunks: Callable[[EventSink], ChunkSink]) -> ChunkSink:
        """What to give the exchange: tells this stream whose events come."""
        return _HeldChunks(self, make_chunks(self))

    def begin_choice(self, index: int) -> None:
        self._choice = index
        while len(self._counts) <= index:
            self._counts.append(0)
            self._dropped.append(0)
            if len(self._skipped) < len(self._counts):
                self._skipped.append(0)

    def note(self) -> None:
        """Have the journal name this stream; `noted` waits for it."""
        loop = asyncio.get_running_loop()
        noted = self._noted = loop.create_future()

        def tell() -> None:
            if not noted.done():
                noted.set_result(None)

        def on_written() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell)

        self._streams.journal.accepted(self.record, on_written)

    async def noted(self) -> None:
        """Until a server that comes after this one can take the stream up, so that clients may hear of it.

        A disk that is full, or stands still for too long, costs the stream that, and its client nothing more.
        """
        if self._noted is None or self._noted.done():
            return
        await asyncio.wait([self._noted], timeout=self._streams.limits.note_s)
        if not self._noted.done():
            self._streams.journal.num_late += 1
            self._noted.set_result(None)  # nobody else waits as long again

    def release(self) -> None:
        """What the exchange has to tell may come. Safe to call again."""
        if not self._is_released:
            self._is_released = True
            self.exchange.release_held()

    def fail(self) -> None:
        """What is written from now on is an error, and has no number."""
        self.is_failed = True

    def _add(self, choice: int, event: bytes) -> None:
        self._counts[choice] += 1
        self._events.append((choice, event))
        self.num_bytes += len(event)
        self._tell(choice, self._counts, event)
        while self.num_bytes > self._max_bytes:
            oldest, dropped = self._events.popleft()
            self._dropped[oldest] += 1
            self.num_bytes -= len(dropped)

    def _tell(self, choice: int, counts: Sequence[int], event: bytes) -> None:
        """Write an event to the client, if there is one and it has not had it."""
        skipped = self._skipped
        if self._client is None or counts[choice] <= skipped[choice]:
            return
        if self._is_doubted and sum(counts) > max(sum(skipped), self.record.num_events):
            self._is_doubted = False
            self._streams.journal.got_further(self.record, sum(counts))
        if len(skipped) == len(counts) == 1:  # nearly always, and for every token
            self._client.write(b"%b%d\n%b" % (self._id_line, counts[0], event))
            return
        numbers = b".".join([b"%d" % max(had, count) for had, count in zip_longest(skipped, counts, fillvalue=0)])
        self._client.write(b"%b%b\n%b" % (self._id_line, numbers, event))

    # ---- who reads it ----

    def check_position(self, position: EventPosition) -> None:
        """See whether a client may go on from there.

        Raises:
            ApiError: 410, events behind it are no longer held.
        """
        given = [*position.counts, *[0] * (len(self._dropped) - len(position.counts))]
        if any(count < dropped for count, dropped in zip(given, self._dropped, strict=False)):
            raise ApiError(
                410,
                "events that came after this one are no longer held: send the request anew",
                param=LAST_EVENT_ID,
                code="events_gone",
            )

    def attach(self, client: EventStream, position: EventPosition) -> asyncio.Future[None]:
        """Write what a client has not had, and from now on what comes; whoever read before is cut off.

        Returns:
            Done once every event was written, or the client is replaced or lost.
        """
        self._cut_off()
        self._streams.keep(self)
        counts = list(self._dropped)
        self._skipped = [*position.counts, *[0] * (len(counts) - len(position.counts))]
        self._client = client
        for choice, event in self._events:
            counts[choice] += 1
            self._tell(choice, counts, event)
        self._over = asyncio.get_running_loop().create_future()
        if self._error:
            client.write(self._error)
        if self.is_finished:
            self._over.set_result(None)
        return self._over

    def detach(self, client: EventStream) -> None:
        """A client is gone, whatever it has read."""
        if self._client is client:
            self._client = None
            self._wake()
            self._streams.lost_client(self)

    def left_alone(self) -> None:
        """No response tells of it any more, even if none of them had come to read: it does not last for ever."""
        if self.expiry is None:
            self._streams.lost_client(self)

    def delivered(self, client: EventStream) -> None:
        """Everything was handed to the system for a client: another server need not generate it again."""
        if self._client is client and self.is_finished:
            self._client = None
            if not self._may_go_on:
                self._streams.journal.ended(self.record.response_id)
            self._streams.lost_client(self)

    def finish(self) -> None:
        """The exchange is over."""
        self.is_finished = True
        self._wake()
        if self._client is None:
            self._streams.lost_client(self)

    def set_may_go_on(self) -> None:
        """It failed for want of an engine: the next server that opens the journal takes it up again."""
        self._may_go_on = True

    @property
    def may_go_on(self) -> bool:
        return self._may_go_on

    def _cut_off(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            client.shed()
            self._wake()

    def _wake(self) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


class _ChoiceText:
    """Where one choice's texts go."""

    __slots__ = ("_choice", "_held")

    def __init__(self, held: HeldStream, choice: int) -> None:
        self._held = held
        self._choice = choice

    def write_text(self, head: bytes, text: str, tail: bytes) -> int:
        return self._held.write_choice_text(self._choice, head, text, tail)


class _HeldChunks:
    """Between an exchange and an endpoint's chunks: says which choice the events belong to."""

    def __init__(self, held: HeldStream, chunks: ChunkSink) -> None:
        self._held = held
        self._chunks = chunks

    def delta(self, choice: Choice, delta: TextDelta) -> None:
        self._held.begin_choice(choice.index)
        self._chunks.delta(choice, delta)
        if choice.stream is self._held:
            choice.stream = _ChoiceText(self._held, choice.index)

    def finished(self) -> None:
        self._held.begin_choice(0)
        self._chunks.finished()

    def failed(self, error: ApiError) -> None:
        if error.status == 503:
            self._held.set_may_go_on()
        self._held.fail()
        self._chunks.failed(error)


class HeldStreams:
    """All streams of a server whose events are held, and the journal that names them.

    Args:
        journal: where they are noted.
        pump: writes what clients read.
        limits: how long and how much.
    """

    def __init__(self, journal: StreamJournal, pump: StreamPump, limits: HoldLimits | None = None) -> None:
        self.journal = journal
        self.pump = pump
        self.limits = limits or HoldLimits()
        self.num_resumed = 0  # clients that went on where they were
        self._streams: dict[str, HeldStream] = {}
        self._to_come: dict[str, None] = dict.fromkeys(record.response_id for record in journal.to_resume)
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._streams)

    def is_known(self, response_id: str) -> bool:
        return response_id in self._streams or response_id in self._to_come

    def may_hold(self, response_id: str, num_choices: int) -> bool:
        """Whether a stream's events can be numbered: clients may choose ids, of which some are taken."""
        return num_choices <= MAX_CHOICES and not self.is_known(response_id) and not self._is_closed

    def find(self, position: EventPosition, owner: str) -> HeldStream:
        """The stream that a client wants to go on with.

        Raises:
            ApiError: 404, there is none (any more), or it is somebody else's; 503, it is about to be taken up again.
        """
        if position.response_id in self._to_come:
            raise ApiError(
                503,
                "this stream is about to be taken up again: try again",
                code="stream_not_ready",
                headers={"Retry-After": "1"},
            )
        held = self._streams.get(position.response_id)
        if held is None or not hmac.compare_digest(held.record.owner, owner):
            raise ApiError(
                404,
                "no stream of this id is held: it ended too long ago, or was never begun. Send the request anew, "
                f"without {LAST_EVENT_ID}",
                param=LAST_EVENT_ID,
                code="stream_not_found",
            )
        held.check_position(position)
        return held

    def new_seeds(self, num_prompts: int) -> tuple[int, ...]:
        """A seed for each prompt of a request that names none, so that its answer can be generated again."""
        return tuple(secrets.randbits(63) for _ in range(num_prompts))

    def hold(self, record: StreamRecord, exchange: Exchange) -> HeldStream:
        """Begin to hold a stream."""
        self._to_come.pop(record.response_id, None)
        held = self._streams[record.response_id] = HeldStream(self, record, exchange)
        exchange.done.add_done_callback(lambda _: self._exchange_done(held))
        return held

    def _exchange_done(self, held: HeldStream) -> None:
        future = held.exchange.done
        if not future.cancelled():
            future.exception()  # told by `started`; nobody else may be waiting
        if self._streams.get(held.record.response_id) is held:
            held.finish()

    def keep(self, held: HeldStream) -> None:
        """Somebody reads it: it does not expire."""
        if held.expiry is not None:
            held.expiry.cancel()
            held.expiry = None

    def lost_client(self, held: HeldStream) -> None:
        """Nobody reads it: it is kept for a while."""
        self._expire_in(self.limits.hold_s if held.is_finished else self.limits.grace_s, held)

    def taken_up(self, held: HeldStream) -> None:
        """A stream of an earlier server is generated again, whose client has yet to find out."""
        if not held.num_readers:
            self._expire_in(self.limits.hold_s, held)

    def _expire_in(self, seconds: float, held: HeldStream) -> None:
        if self._is_closed or self._streams.get(held.record.response_id) is not held:
            return
        self.keep(held)
        held.expiry = asyncio.get_running_loop().call_later(seconds, self._expire, held)
        if held.is_finished:
            self._make_room()

    def give_up(self, record: StreamRecord) -> None:
        """A stream of an earlier server cannot be taken up again."""
        self._to_come.pop(record.response_id, None)
        self.journal.ended(record.response_id)

    def put_off(self, held: HeldStream) -> None:
        """The engine cannot take it now; it will be tried again."""
        self.drop(held, is_over=False)
        self._to_come[held.record.response_id] = None

    def drop(self, held: HeldStream, *, is_over: bool = True) -> None:
        """Hold a stream no longer, and generate it no longer.

        Args:
            is_over: nobody will ask for it; else the next server takes it up again.
        """
        self.keep(held)
        if self._streams.get(held.record.response_id) is held:
            del self._streams[held.record.response_id]
            if is_over and not self._is_closed:
                self.journal.ended(held.record.response_id)
        held.exchange.cancel()

    def leave_unread(self) -> None:
        """Leave to the next server what nobody reads here: a drain need not wait for it."""
        for held in list(self._streams.values()):
            if not held.num_readers:
                self.drop(held, is_over=False)

    async def close(self) -> None:
        """Stop holding; what is not finished or not read is left for the next server."""
        self._is_closed = True
        for held in list(self._streams.values()):
            self.drop(held, is_over=False)
        await asyncio.to_thread(self.journal.close)

    def _expire(self, held: HeldStream) -> None:
        held.expiry = None
        if not held.num_readers:
            self.drop(held, is_over=not held.may_go_on)

    def _make_room(self) -> None:
        finished = [held for held in self._streams.values() if held.is_finished and not held.num_readers]
        num_bytes = sum(held.num_bytes for held in finished)
        for held in finished:
            if num_bytes <= self.limits.max_finished_bytes:
                return
            num_bytes -= held.num_bytes
            self.drop(held, is_over=not held.may_go_on)


HELD_STREAMS = web.AppKey("held_streams", HeldStreams)
