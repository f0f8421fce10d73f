"""The inbound half of a port: every frame is checked, and each peer hears how much more it may send."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import zmq

from ...messages.base import Message
from .envelope import DATA, GRANT, HEAD_BYTES, HELLO, PROTOCOL_VERSION, RESET, NotAnEnvelopeError, seal, unseal
from .incoming_link import IncomingLink
from .port_limits import PortLimits
from .port_record import PortRecord
from .reception import Reception, reply
from .wire import MalformedMessageError

MAX_BATCH = 256
"""Frames read at once; a port that is flooded gives way to its process's other work."""

# As plain integers: the enumeration's operators take a microsecond each.
_DONTWAIT: Final = int(zmq.DONTWAIT)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_RCVMORE: Final = int(zmq.RCVMORE)


class Door:
    """Reads a ROUTER: checks every frame, grants room.

    Args:
        incarnation: of this process.
        reception: who may come in.
        has_keys: whether connections may carry a CURVE key.
        record: where everything odd is counted.

    Attributes:
        router: what is read; None while nothing is bound.
        has_more: the last reading stopped at its bound, or may have swallowed an edge: nothing will announce the rest.
    """

    def __init__(
        self, *, incarnation: int, reception: Reception, limits: PortLimits, has_keys: bool, record: PortRecord
    ) -> None:
        self.router: zmq.Socket[bytes] | None = None
        self.has_more = False
        self._incarnation = incarnation
        self._reception = reception
        self._limits = limits
        self._has_keys = has_keys
        self._count = record.count
        self._report = record.report
        self._held_back: dict[IncomingLink, None] = {}  # whose grant waits for its rate
        self._is_discarding = False

    def read(
        self, router: zmq.Socket[bytes], messages: list[tuple[str, Message]], max_frames: int, now_ns: int
    ) -> None:
        """Append what is there to `messages`, at most `max_frames` frames; `has_more` says whether that was all."""
        recv = router.recv
        self.has_more = True
        due: dict[IncomingLink, None] = {}
        is_first = True
        for _ in range(max_frames):
            if self._is_discarding and not self._discard(router):
                break
            try:
                routing_id = recv(_DONTWAIT)
            except zmq.Again:
                if not due:
                    self.has_more = False
                    break
                # Granting sends, and sending may swallow an edge: look again afterwards.
                self._grant(due, now_ns)
                due.clear()
                continue
            link = self._reception.by_routing_id.get(routing_id)
            if link is None:
                self._on_stranger(router, routing_id)
                continue
            frame = recv(_DONTWAIT)
            if link.is_stale or link.is_broken:
                self._on_dead_link(router, link, routing_id, frame)
                continue
            self._on_link_frame(router, link, frame, messages, now_ns)
            if link.is_grant_due:
                due[link] = None
            elif is_first and not int(router.get(_EVENTS)) & _POLLIN:
                # Most wake-ups bring one message. To look costs less than to receive and be told that there is none.
                self.has_more = False
                break
            is_first = False
        self._grant(due, now_ns)

    def _on_link_frame(
        self,
        router: zmq.Socket[bytes],
        link: IncomingLink,
        frame: bytes,
        messages: list[tuple[str, Message]],
        now_ns: int,
    ) -> None:
        try:
            head = unseal(frame)
        except NotAnEnvelopeError as error:
            # It was a message, and nobody can tell which: if it was the last one, no gap would show that it is missing.
            self._discard_rest(router)
            self._on_malformed(link, str(error))
            self._reception.break_link(router, link)
            return
        if head.version != PROTOCOL_VERSION or head.kind != DATA:
            is_hello = head.kind == HELLO and not router.get(zmq.RCVMORE)
            if is_hello:
                self._reception.hear_hello(router, head, frame, routing_id=link.routing_id, key=link.key)
            else:
                self._discard_rest(router)
                self._count("version" if head.version != PROTOCOL_VERSION else "malformed", link.name)
            return
        has_more = router.get(_RCVMORE)
        tensors = self._read_tensors(router, head.num_tensors) if has_more or head.num_tensors else ()
        if tensors is None:
            self._count("multipart", link.name)
            self._reception.break_link(router, link)
            return
        if head.incarnation != link.incarnation:
            self._count("stale_incarnation", link.name)
            return
        if head.sequence < link.next_sequence:
            self._count("repeated", link.name)
            return
        if head.sequence > link.next_sequence:
            self._count("gap", link.name)
            self._report(link.name, "gap", f"message {link.next_sequence} is missing, {head.sequence} came")
            self._reception.break_link(router, link)
            return
        if link.is_beyond_window(head.sequence):
            if self._count("overrun", link.name):
                self._report(link.name, "overrun")
            return
        try:
            message = link.decoder.decode(memoryview(frame)[HEAD_BYTES:], tensors)
        except MalformedMessageError as error:
            # Sealed and in sequence, so the peer meant it: sending it again would not help.
            link.take(len(frame), now_ns)
            self._on_malformed(link, str(error))
            return
        num_bytes = len(frame)
        for tensor in tensors:
            num_bytes += tensor.nbytes
        link.take(num_bytes, now_ns)
        messages.append((link.name, message))

    def _on_malformed(self, link: IncomingLink, why: str) -> None:
        if self._count("malformed", link.name, why):
            self._report(link.name, "malformed", why)

    def _on_stranger(self, router: zmq.Socket[bytes], routing_id: bytes) -> None:
        frame = router.recv(zmq.DONTWAIT, copy=False)
        if frame.more:
            self._discard_rest(router)
            self._count("multipart")
            return
        try:
            head = unseal(frame.bytes)
        except NotAnEnvelopeError as error:
            self._count("malformed", "", str(error))
            return
        if head.kind == HELLO:
            key = ""
            if self._has_keys:
                try:
                    key = str(frame.get("User-Id"))
                except zmq.ZMQError:  # an ipc connection: the directory's mode speaks for it
                    key = ""
            descriptor = int(frame.get(zmq.SRCFD))
            self._reception.hear_hello(router, head, frame.bytes, routing_id=routing_id, key=key, descriptor=descriptor)
            return
        self._count("foreign")
        if head.kind == DATA:  # a connection that was made again: ask for the hello
            reply(router, routing_id, seal(RESET, self._incarnation, 0))

    def _on_dead_link(self, router: zmq.Socket[bytes], link: IncomingLink, routing_id: bytes, frame: bytes) -> None:
        """A link that broke or was superseded: only a hello counts."""
        is_alone = not router.get(zmq.RCVMORE)
        self._discard_rest(router)
        try:
            head = unseal(frame)
        except NotAnEnvelopeError:
            self._count("malformed", link.name)
            return
        if head.kind == HELLO and is_alone:
            self._reception.hear_hello(router, head, frame, routing_id=routing_id, key=link.key)
            return
        if not link.is_stale:
            return  # counted when it broke
        self._count("stale_incarnation", link.name)
        self._reception.tell_stale(router, link)

    def attend(self) -> None:
        """Shut the oldest connections that have not introduced themselves, if there are too many, and admit those whose
        name has become free.

        Not before everything that has come is read: a hello, or somebody's last words, may be among it.
        """
        reception, router = self._reception, self.router
        if self.has_more or router is None:
            return
        strangers, most = reception.strangers, self._limits.max_strangers
        if strangers is not None and len(strangers) > most:
            for _ in range(strangers.shut_oldest()):
                self._count("stranger", "", f"more than {most} connections without a hello")
        if reception.has_parked and reception.admit_parked(router):
            self.has_more = True  # sending may have swallowed an edge

    # Grants

    def _grant(self, links: Collection[IncomingLink], now_ns: int) -> None:
        for link in links:
            if link.is_stale or link.is_broken:
                continue
            if link.wait_ns(now_ns):
                if link not in self._held_back:
                    self._held_back[link] = None
                    self._count("held_back", link.name)
                continue
            assert self.router is not None
            if reply(self.router, link.routing_id, seal(GRANT, self._incarnation, link.next_sequence)):
                link.on_granted()

    def grant_held_back(self, now_ns: int) -> None:
        """Grant what was held back and whose time has come."""
        ready = [link for link in self._held_back if link.is_stale or link.is_broken or not link.wait_ns(now_ns)]
        for link in ready:
            del self._held_back[link]
        if ready:
            self._grant(ready, now_ns)
            self.has_more = True  # sending may have swallowed an edge

    def delay_ms(self, now_ns: int) -> int | None:
        """When a grant that is held back is due; None: there is none."""
        if not self._held_back:
            return None
        return -(-min(link.wait_ns(now_ns) for link in self._held_back) // 1_000_000)

    def _read_tensors(self, router: zmq.Socket[bytes], num_tensors: int) -> tuple[memoryview, ...] | None:
        """The frames beside a message; None: not as many as it says, or more than may be."""
        if num_tensors > self._limits.max_tensors:
            self._discard_rest(router)
            return None
        tensors: list[memoryview] = []
        while len(tensors) < num_tensors and router.get(zmq.RCVMORE):
            tensors.append(router.recv(zmq.DONTWAIT, copy=False).buffer)
        if router.get(zmq.RCVMORE):
            self._discard_rest(router)
            return None
        return tuple(tensors) if len(tensors) == num_tensors else None

    def _discard_rest(self, router: zmq.Socket[bytes]) -> None:
        self._is_discarding = bool(router.get(zmq.RCVMORE))
        if self._is_discarding:
            self._discard(router)

    def _discard(self, router: zmq.Socket[bytes]) -> bool:
        """Drop parts of a message of too many; False: some are left, for the next call."""
        for _ in range(MAX_BATCH):
            if not router.get(zmq.RCVMORE):
                self._is_discarding = False
                return True
            router.recv(zmq.DONTWAIT, copy=False)
        return False
