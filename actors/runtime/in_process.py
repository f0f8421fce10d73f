"""All actors on one asyncio event loop, each with a bounded mailbox drained by a loop callback.

A hop costs one or two microseconds: no task, no future, no stream (measured against `asyncio.Queue` and anyio's memory
streams by `python -m octavo.actors.runtime.bench`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from ...messages.base import Message
from .clock import Clock
from .routes import Address, Routes

Handler = Callable[[Message, int], Iterable[Message]]
"""`handle(message, now_ns)` of a core: what to send in answer."""

MAX_BATCH = 256
"""Messages an actor takes at once before the others have their turn."""


class MailboxFullError(RuntimeError):
    """A mailbox reached the bound its creator chose. Admission keeps requests below it, so this is a defect."""


class Carrier(Protocol):
    """Anything that can be posted to: an actor's mailbox, whatever lies behind it."""

    def post(self, message: Message) -> None: ...


class Mailbox:
    """The FIFO inbox of one actor, and the loop callback that empties it into the actor's handler.

    Args:
        address: whose mailbox.
        handler: the core's `handle`.
        runtime: where answers go and the time comes from.
        capacity: most messages waiting.
        after_batch: a message handed to the handler each time the mailbox has been emptied.
        max_hold_ns: the loop gets its turn after so long, though messages are left; 0: after a batch.
    """

    def __init__(
        self,
        address: Address,
        handler: Handler,
        runtime: InProcessRuntime,
        *,
        capacity: int,
        after_batch: Message | None = None,
        max_hold_ns: int = 0,
    ) -> None:
        self._address = address
        self._handler = handler
        self._runtime = runtime
        self._capacity = capacity
        self._after_batch = after_batch
        self._max_hold_ns = max_hold_ns
        self._inbox: deque[Message] = deque()
        self._is_scheduled = False

    def __len__(self) -> int:
        return len(self._inbox)

    def post(self, message: Message) -> None:
        """Append a message; the actor handles it in a later callback of the loop.

        Raises:
            MailboxFullError: the bound is reached.
        """
        if len(self._inbox) >= self._capacity:
            raise MailboxFullError(f"mailbox of {self._address} holds {self._capacity} messages already")
        self._inbox.append(message)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._runtime.loop.call_soon(self._drain)

    def wake(self) -> None:
        """Run the handler's `after_batch` even though nothing arrived (a deadline may have passed)."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._runtime.loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._is_scheduled = False
        runtime = self._runtime
        inbox, handler = self._inbox, self._handler
        now_ns = runtime.clock.now_ns()
        try:
            for _ in range(min(len(inbox), MAX_BATCH)):
                answers = handler(inbox.popleft(), now_ns)
                if answers:
                    runtime.send_all(self._address, answers)
                if self._max_hold_ns and runtime.clock.now_ns() - now_ns >= self._max_hold_ns:
                    break
            if inbox:
                self._is_scheduled = True
                runtime.loop.call_soon(self._drain)
            elif self._after_batch is not None:
                answers = handler(self._after_batch, now_ns)
                if answers:
                    runtime.send_all(self._address, answers)
        except Exception as error:
            runtime.fail(self._address, error)


class InProcessRuntime:
    """Delivers messages between carriers on the running event loop.

    Args:
        routes: which addresses hear which message of which sender.
        clock: time given to handlers.
        on_failure: called once, with the first exception that escapes an actor.
    """

    def __init__(self, routes: Routes, clock: Clock, on_failure: Callable[[Address, Exception], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = clock
        self._routes = routes
        self._carriers: dict[Address, Carrier] = {}
        self._targets: dict[Address, dict[type[Message], tuple[Callable[[Message], None], ...]]] = {}
        self._on_failure = on_failure
        self._has_failed = False

    def add(self, address: Address, carrier: Carrier) -> None:
        """Register an actor's inbox; every address of the routes needs one before the first message."""
        self._carriers[address] = carrier

    def add_actor(
        self,
        address: Address,
        handler: Handler,
        capacity: int,
        *,
        after_batch: Message | None = None,
        max_hold_ns: int = 0,
    ) -> Mailbox:
        """Give an actor a mailbox on this loop; the arguments are `Mailbox`'s."""
        mailbox = Mailbox(address, handler, self, capacity=capacity, after_batch=after_batch, max_hold_ns=max_hold_ns)
        self.add(address, mailbox)
        return mailbox

    def connect(self) -> None:
        """Resolve the routes; raises `KeyError` for an address without a carrier."""
        for (sender, kind), receivers in self._routes.items():
            posts = tuple(self._carriers[receiver].post for receiver in receivers)
            self._targets.setdefault(sender, {})[kind] = posts

    def send(self, sender: Address, message: Message) -> None:
        """Deliver one message to whoever hears it."""
        for post in self._targets[sender][type(message)]:
            post(message)

    def send_all(self, sender: Address, messages: Iterable[Message]) -> None:
        """Deliver what a handler returned, in order."""
        targets = self._targets[sender]
        kind: type[Message] | None = None
        posts: tuple[Callable[[Message], None], ...] = ()
        for message in messages:
            if type(message) is not kind:  # a step's deltas come by the hundred: look their receivers up once
                kind = type(message)
                posts = targets[kind]
            for post in posts:
                post(message)

    def send_from_thread(self, sender: Address, message: Message) -> None:
        """Like `send`, from a thread that is not the loop's; a closed loop drops the message."""
        try:
            self.loop.call_soon_threadsafe(self.send, sender, message)
        except RuntimeError:  # the loop closed while a step was running
            if not self.loop.is_closed():
                raise

    def fail(self, address: Address, error: Exception) -> None:
        """Report an exception that escaped an actor; only the first counts, the graph is beyond repair."""
        if not self._has_failed:
            self._has_failed = True
            self._on_failure(address, error)
