"""Processes and the links between them, under virtual time, around the production mailboxes."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import get_args

import msgspec

from ...actors.runtime.clock import Clock
from ...actors.runtime.in_process import Handler, InProcessRuntime, Mailbox
from ...actors.runtime.routes import ROUTES, Address
from ...messages.base import Message
from ...messages.request import CancelRequest, StopMatched
from ...messages.step import StepExecuted
from ...messages.system import Drain, ExecutorFailed, ExecutorLost, ExecutorReady
from ..agenda import Agenda

MAILBOX_CAPACITY = 2000
"""Far above what a dozen requests may have under way: to reach it is to grow without bound."""

ADDRESSES: tuple[Address, ...] = get_args(Address)

REPEATABLE: dict[type[Message], tuple[Address, ...]] = {
    StepExecuted: ("scheduler",),
    ExecutorReady: ("supervisor",),
    ExecutorFailed: ("supervisor",),
    ExecutorLost: ("scheduler",),
    CancelRequest: ("scheduler", "tokenizer"),
    StopMatched: ("scheduler",),
    Drain: ("scheduler",),
}
"""Messages that their receivers must bear twice, because whoever sends them may not know that they arrived."""

_Post = Callable[[Message], None]
_WIRE = msgspec.msgpack.Encoder()
_UNWIRE: dict[type[Message], msgspec.msgpack.Decoder[Message]] = {}


def _encode_and_decode(message: Message) -> Message:
    kind = type(message)
    decoder = _UNWIRE.get(kind)
    if decoder is None:
        decoder = _UNWIRE[kind] = msgspec.msgpack.Decoder(kind)
    return decoder.decode(_WIRE.encode(message))


class VirtualClock:
    """The clock that handlers see: virtual time, and the jumps that a stalled machine makes."""

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        self.jumped_ns = 0

    def now_ns(self) -> int:
        return self._agenda.now_ns + self.jumped_ns


class _Loop:
    """What the in-process runtime needs of an event loop: callbacks, in order, each after the process turned to it."""

    def __init__(self, agenda: Agenda, rng: random.Random, hop_ns: int) -> None:
        self._agenda = agenda
        self._random = rng.random
        self._hop_ns = hop_ns
        self._last_from_thread_ns = 0
        self.stalled_until_ns = 0

    def _soon_ns(self) -> int:
        at_ns = self._agenda.now_ns
        if self._hop_ns:
            at_ns += int(self._random() * self._hop_ns)
        return max(at_ns, self.stalled_until_ns)

    def call_soon(self, callback: Callable[[], None]) -> None:
        # Whose turn comes first is open: mailboxes keep the order that matters.
        self._agenda.add(self._soon_ns(), 0, callback)

    def call_soon_threadsafe(self, callback: Callable[..., None], *args: object) -> None:
        # A thread's messages stay in order.
        at_ns = self._last_from_thread_ns = max(self._soon_ns(), self._last_from_thread_ns)
        self._agenda.add(at_ns, 0, partial(callback, *args))

    @staticmethod
    def is_closed() -> bool:
        return False


class Link:
    """One direction between two processes: delays, first in first out, and whether it is clogged."""

    def __init__(
        self, agenda: Agenda, rng: random.Random, *, max_delay_ns: int, duplicate_rate: float, encodes: bool
    ) -> None:
        self._agenda = agenda
        self._random = rng.random
        self._max_delay_ns = max_delay_ns
        self._duplicate_rate = duplicate_rate
        self._encodes = encodes
        self._last_ns = 0
        self.clogged_until_ns = 0
        self.lost_until_ns = 0
        self._under_way: deque[list[bool]] = deque()  # whether it is lost, for each message sent and not arrived

    def send(self, address: Address, post: _Post, message: Message) -> None:
        """Let a message arrive later, behind all that were sent before it."""
        agenda = self._agenda
        if self._encodes:
            message = _encode_and_decode(message)
        at_ns = agenda.now_ns
        if self._max_delay_ns:
            at_ns += int(self._random() * self._max_delay_ns)
        at_ns = max(at_ns, self.clogged_until_ns, self._last_ns)
        self._last_ns = at_ns
        is_lost = [agenda.now_ns < self.lost_until_ns]
        self._under_way.append(is_lost)
        agenda.add(at_ns, 0, partial(_arrive, self._under_way, post, message))
        if self._duplicate_rate and address in REPEATABLE.get(type(message), ()):
            while self._random() < self._duplicate_rate:
                self._under_way.append(is_lost)
                agenda.add(at_ns, 0, partial(_arrive, self._under_way, post, message))

    def renew(self) -> None:
        """A new process has taken the place of one at its end: another connection, on which nothing stands still.

        What is under way on the old one arrives when it would have.
        """
        self._under_way = deque()
        self._last_ns = self.clogged_until_ns = self.lost_until_ns = 0

    def lose_sent(self, num_kept: int = -1) -> None:
        """Whoever sends here dies: of what is under way, the end is lost, from a random message on.

        Args:
            num_kept: how many arrive; -1: chance says.
        """
        if num_kept < 0:
            num_kept = int(self._random() * (len(self._under_way) + 1))
        for is_lost in islice(self._under_way, num_kept, None):
            is_lost[0] = True


def _arrive(under_way: deque[list[bool]], post: _Post, message: Message) -> None:
    (is_lost,) = under_way.popleft()  # they arrive as they were sent
    if not is_lost:
        post(message)


class _Box(Mailbox):
    """A mailbox whose process may die."""

    def lose_all(self) -> None:
        """What waits is lost with its process, and so is its turn."""
        self._inbox.clear()
        self._is_scheduled = False


class _Remote:
    """Carrier of an actor in another process."""

    def __init__(self, address: Address, link: Link, post: _Post) -> None:
        self.post: _Post = partial(link.send, address, post)


class Process:
    """The actors of one process on their own loop, and the links to the others."""

    def __init__(
        self,
        agenda: Agenda,
        clock: Clock,
        rng: random.Random,
        *,
        hop_ns: int,
        on_failure: Callable[[Address, Exception], None],
    ) -> None:
        self.loop = _Loop(agenda, rng, hop_ns)
        # A loop of ours: the runtime takes the one that is running.
        asyncio._set_running_loop(self.loop)  # type: ignore[arg-type]  # as much of a loop as it uses
        try:
            self.runtime = InProcessRuntime(ROUTES, clock, on_failure)
        finally:
            asyncio._set_running_loop(None)
        self.mailboxes: dict[Address, _Box] = {}

    def add(self, address: Address, handler: Handler, after_batch: Message | None = None) -> None:
        """Let an actor live here."""
        mailbox = _Box(address, handler, self.runtime, capacity=MAILBOX_CAPACITY, after_batch=after_batch)
        self.mailboxes[address] = mailbox
        self.runtime.add(address, mailbox)

    def renew(self) -> None:
        """Another process takes its place: it has heard nothing yet, and nothing holds it up."""
        self.loop.stalled_until_ns = 0
        self.runtime._has_failed = False
        for mailbox in self.mailboxes.values():
            mailbox.lose_all()

    def link(self, address: Address, link: Link, post: _Post) -> None:
        """Let an actor that lives elsewhere be heard from here."""
        self.runtime.add(address, _Remote(address, link, post))
