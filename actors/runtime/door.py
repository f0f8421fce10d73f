"""The inbound half of a port: who may speak, in which order, and how much."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import msgspec
import zmq

from ...messages.base import Message
from .curve import AllowList
from .envelope import (
    DATA,
    GRANT,
    HEAD_BYTES,
    HELLO,
    PROTOCOL_VERSION,
    REFUSE,
    RESET,
    WELCOME,
    Head,
    Hello,
    NotAnEnvelopeError,
    Refuse,
    Welcome,
    decode_hello,
    encode_control,
    seal,
    unseal,
)
from .incoming_link import IncomingLink
from .name_claims import Claim, NameClaims
from .port_limits import PortLimits
from .port_record import PortRecord
from .strangers import Strangers
from .wire import Decoder, MalformedMessageError

Allowed = Mapping[str, Collection[type[Message]]]
"""Which messages a peer may send, by its name or its role: a role is a name without its number ("executor 3")."""

MAX_BATCH = 256
"""Frames read at once; a port that is flooded gives way to its process's other work."""

MAX_NAME_LENGTH = 64

# As plain integers: the enumeration's operators take a microsecond each.
_DONTWAIT: Final = int(zmq.DONTWAIT)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_RCVMORE: Final = int(zmq.RCVMORE)


class Door:
    """Reads a ROUTER: judges hellos, checks every frame, grants room.

    Args:
        name, incarnation: of this process.
        schema: this build's message hash.
        allowed: what each peer may send; nobody else is heard.
        self_announced: roles of which the newest start takes the name at once, as nobody else tells of it.
        allow_list: CURVE keys that may connect, if there is a list.
        has_keys: whether connections may carry a CURVE key.
        record: where everything odd is counted.
    """

    def __init__(
        self,
        *,
        name: str,
        incarnation: int,
        schema: str,
        limits: PortLimits,
        allowed: Allowed,
        allow_list: AllowList | None,
        has_keys: bool,
        record: PortRecord,
        self_announced: Collection[str] = (),
    ) -> None:
        self._self_announced = frozenset(self_announced)
        self.router: zmq.Socket[bytes] | None = None
        self.strangers: Strangers | None = None
        self.has_more = False  # the last reading stopped at its bound: no edge will announce the rest
        self.held_back: dict[str, IncomingLink] = {}  # by name: whose grant waits for its rate
        self._name = name
        self._incarnation = incarnation
        self._schema = schema
        self._limits = limits
        self._allowed = {peer: tuple(kinds) for peer, kinds in allowed.items()}
        self._allow_list = allow_list
        self._has_keys = has_keys
        self._counters = record.counters
        self._count = record.count
        self._report = record.report
        self._incoming: dict[str, IncomingLink] = {}  # by name
        self._by_routing_id: dict[bytes, IncomingLink] = {}
        self._claims = NameClaims()
        self._keys_of: dict[str, str] = {}  # by name: the only key that may speak for it
        self._is_discarding = False

    def vouch(self, peer: str, key: str) -> None:
        """From now on a peer's name may be used with this CURVE key alone; empty: on this host's sockets alone.

        The allow-list must still have the key; that it may keep it for another name does not matter.
        """
        self._keys_of[peer] = key
        link = self._incoming.get(peer)
        if link is not None and link.key != key:
            self._retire(link)

    def expect(self, peer: str, incarnation: int) -> None:
        """From now on a peer is stale below this incarnation."""
        self._claims.announce(peer, incarnation)
        link = self._incoming.get(peer)
        if link is not None and link.incarnation < incarnation:
            self._retire(link)

    def read(
        self, router: zmq.Socket[bytes], messages: list[tuple[str, Message]], max_frames: int, now_ns: int
    ) -> None:
        """Append what is there to `messages`, at most `max_frames` frames; `has_more` says whether that was all."""
        recv = router.recv
        self.has_more = True
        due: dict[str, IncomingLink] = {}
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
                self._grant(due.values(), now_ns)
                due.clear()
                continue
            link = self._by_routing_id.get(routing_id)
            if link is None:
                self._on_stranger(router, routing_id)
                continue
            frame = recv(_DONTWAIT)
            if link.is_stale or link.is_broken:
                self._on_dead_link(router, link, routing_id, frame)
                continue
            self._on_link_frame(router, link, frame, messages, now_ns)
            if link.is_grant_due:
                due[link.name] = link
            elif is_first and not int(router.get(_EVENTS)) & _POLLIN:
                # Most wake-ups bring one message. To look costs less than to receive and be told that there is none.
                self.has_more = False
                break
            is_first = False
        self._grant(due.values(), now_ns)

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
            self._discard_rest(router)
            self._on_malformed(link, str(error))
            return
        if head.version != PROTOCOL_VERSION or head.kind != DATA:
            is_hello = head.kind == HELLO and not router.get(zmq.RCVMORE)
            if is_hello:
                self._on_hello(link.routing_id, link.key, head, frame)
            else:
                self._discard_rest(router)
                self._count("version" if head.version != PROTOCOL_VERSION else "malformed", link.name)
            return
        has_more = router.get(_RCVMORE)
        tensors = self._read_tensors(router, head.num_tensors) if has_more or head.num_tensors else ()
        if tensors is None:
            self._count("multipart", link.name)
            self._break(router, link)
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
            self._break(router, link)
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
            self._on_hello(routing_id, key, head, frame.bytes, int(frame.get(zmq.SRCFD)))
            return
        self._count("foreign")
        if head.kind == DATA:  # a connection that was made again: ask for the hello
            self._reply(router, routing_id, seal(RESET, self._incarnation, 0))

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
            self._on_hello(routing_id, link.key, head, frame)
            return
        if not link.is_stale:
            return  # counted when it broke
        self._count("stale_incarnation", link.name)
        if not link.was_told:
            link.was_told = True
            if link.key and self._allow_list is not None and not self._allow_list.allows(link.key):
                self._refuse(router, routing_id, "revoked", f"the key of {link.name} was withdrawn")
                return
            self._refuse(router, routing_id, "stale", f"{link.name} {link.incarnation} was replaced")

    def shut_strangers(self) -> None:
        """Shut the oldest connections that have not introduced themselves, if there are too many.

        Not before everything that has come is read: their hello may be among it.
        """
        if self.strangers is None or self.has_more or len(self.strangers) <= self._limits.max_strangers:
            return
        for _ in range(self.strangers.shut_oldest()):
            self._count("stranger", "", f"more than {self._limits.max_strangers} connections without a hello")

    # Hello

    def _on_hello(self, routing_id: bytes, key: str, head: Head, frame: bytes, descriptor: int = -1) -> None:
        """Take a hello; a stranger's comes with the descriptor of its connection."""
        router = self.router
        assert router is not None
        if head.version != PROTOCOL_VERSION:
            self._refuse(
                router,
                routing_id,
                "version",
                f"{self._name} speaks protocol version {PROTOCOL_VERSION}, the hello version {head.version}",
            )
            return
        try:
            hello = decode_hello(memoryview(frame)[HEAD_BYTES:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._count("malformed")
            return
        inode = 0
        if self.strangers is not None:
            descriptor = self.strangers.descriptor_of(routing_id) if descriptor < 0 else descriptor
            self.strangers.read()  # that he came was said before he could say anything
            inode = self.strangers.inode_of(descriptor)
        self._consider(router, Claim(hello, head.incarnation, routing_id, key, descriptor, inode))

    def _is_open(self, claim: Claim) -> bool:
        """Whether the connection that a claim came by is there still."""
        return self.strangers is not None and 0 < claim.inode == self.strangers.inode_of(claim.descriptor)

    def _consider(self, router: zmq.Socket[bytes], claim: Claim) -> None:
        """Welcome whoever said hello, or refuse it, or let it wait for the name that another has."""
        hello = claim.hello
        code, why = self._judge(hello, claim.incarnation, claim.key)
        if code:
            self._refuse(router, claim.routing_id, code, why, hello.name[:MAX_NAME_LENGTH])
        elif not self._must_wait(claim):
            self._welcome(router, claim)
        elif self.strangers is not None:
            if self._claims.park(claim, self._is_open):
                self._count("parked", hello.name, f"{claim.incarnation} was not announced, and another is connected")
            else:
                self._count("refused_hello", hello.name, "too many claim the name")
                self.strangers.shut(claim.descriptor)

    @property
    def has_parked(self) -> bool:
        """Whether anybody waits for a name."""
        return self._claims.has_parked

    def _must_wait(self, claim: Claim) -> bool:
        """Whether another one has the name, is connected, and nobody has announced this one."""
        link = self._incoming.get(claim.hello.name)
        return (
            link is not None
            and claim.incarnation != link.incarnation
            and claim.incarnation > self._claims.announced(claim.hello.name)
            and not (role_of(claim.hello.name) in self._self_announced and claim.incarnation > link.incarnation)
            and self.strangers is not None
            and self.strangers.has_welcomed(link.routing_id)
        )

    def admit_parked(self) -> None:
        """Judge again those that wait for a name: one may have been announced, or the other's connection has ended.

        Not before all that has come is read: the last words of the other may be among it.
        """
        if not self.has_parked or self.has_more or self.router is None:
            return
        for claim in self._claims.take_parked():
            if claim.key and self._allow_list is not None and not self._allow_list.allows(claim.key):
                self._refuse(self.router, claim.routing_id, "revoked", f"the key of {claim.hello.name} was withdrawn")
            elif self._must_wait(claim):
                self._claims.park(claim, self._is_open)
            elif self._is_open(claim):
                self._consider(self.router, claim)
                self.has_more = True  # sending may have swallowed an edge

    def _welcome(self, router: zmq.Socket[bytes], claim: Claim) -> None:
        hello, routing_id, key = claim.hello, claim.routing_id, claim.key
        link = self._incoming.get(hello.name)
        if link is None or (link.session, link.incarnation) != (hello.session, claim.incarnation):
            if link is not None:
                self._displace(router, link)
            link = self._claims.take_aside(claim)
        if link is not None:
            self._by_routing_id.pop(link.routing_id, None)
            link.on_hello(hello, routing_id, key)
            self._counters["reconnected"] += 1
        else:
            link = IncomingLink(
                hello=hello,
                incarnation=claim.incarnation,
                routing_id=routing_id,
                key=key,
                decoder=Decoder(self._allowed.get(hello.name) or self._allowed[role_of(hello.name)]),
                limits=self._limits,
            )
            self._report(hello.name, "heard")
        self._incoming[hello.name] = link
        if self.strangers is not None and claim.descriptor >= 0:
            self.strangers.welcome(claim.descriptor, routing_id)
        self._by_routing_id[routing_id] = link
        while len(self._by_routing_id) > 4 * self._limits.max_peers:  # retired ones, oldest first
            del self._by_routing_id[next(iter(self._by_routing_id))]
        welcome = Welcome(self._name, hello.attempt, self._limits.window)
        self._reply(router, routing_id, seal(WELCOME, self._incarnation, link.next_sequence, encode_control(welcome)))

    def _judge(self, hello: Hello, incarnation: int, key: str) -> tuple[str, str]:
        """Why a hello is refused; two empty strings: it is not."""
        name = hello.name
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            return "name", "a name is at most 64 printable characters"
        if hello.schema != self._schema:
            return (
                "schema",
                f"{self._name} has message schema {self._schema}, {name} has {hello.schema[:64]}: run the same build",
            )
        if name not in self._allowed and role_of(name) not in self._allowed:
            return "unknown", f"{self._name} hears nothing from {name!r}"
        if hello.receiver != self._name or hello.receiver_incarnation not in (0, self._incarnation):
            return (
                "receiver",
                f"this is {self._name} {self._incarnation}, not {hello.receiver[:64]} {hello.receiver_incarnation}",
            )
        if not self._may_speak_for(key, name):
            return "key", f"this key does not speak for {name!r}"
        announced = self._claims.announced(name)
        if incarnation < announced:
            self._counters["stale_incarnation"] += 1
            return "stale", f"{name} {incarnation} was replaced by {announced}"
        link = self._incoming.get(name)
        if link is None:
            if len(self._incoming) >= self._limits.max_peers:
                return "full", f"{self._name} serves {self._limits.max_peers} peers already"
        elif incarnation == link.incarnation:
            if hello.session != link.session or key != link.key:
                return "taken", f"{name} {incarnation} is connected already"
            if hello.attempt <= link.attempt:
                return "repeated", "this hello was heard before"
        if hello.first_sequence < 1:
            return "sequence", "sequences begin with 1"
        return "", ""

    def _may_speak_for(self, key: str, name: str) -> bool:
        if name in self._keys_of:
            return key == self._keys_of[name]
        return not key or self._allow_list is None or self._allow_list.allows_name(key, name)

    def _refuse(self, router: zmq.Socket[bytes], routing_id: bytes, code: str, why: str, peer: str = "") -> None:
        self._count("refused_hello", peer, why)
        self._reply(router, routing_id, seal(REFUSE, self._incarnation, 0, encode_control(Refuse(code, why))))

    def _break(self, router: zmq.Socket[bytes], link: IncomingLink) -> None:
        """Something is missing: nothing counts until the peer says hello again and sends from there."""
        link.is_broken = True
        self._reply(router, link.routing_id, seal(RESET, self._incarnation, link.next_sequence))

    def _retire(self, link: IncomingLink) -> None:
        link.is_stale = True
        self.held_back.pop(link.name, None)
        if self._incoming.get(link.name) is link:
            del self._incoming[link.name]

    def _displace(self, router: zmq.Socket[bytes], link: IncomingLink) -> None:
        """Another has the name now; if it is not stale, this one may come back, and goes on where it was."""
        if link.incarnation < self._claims.announced(link.name):
            self._retire(link)
            return
        self.held_back.pop(link.name, None)
        self._break(router, link)
        self._claims.set_aside(link)

    def check_keys(self) -> None:
        """Look at the allow-list: links of withdrawn keys end."""
        if self._allow_list is None or not self._allow_list.reload():
            return
        for link in list(self._incoming.values()):
            if link.key and not (self._allow_list.allows(link.key) and self._may_speak_for(link.key, link.name)):
                self._retire(link)
                self._count("denied_key", link.name, "its key was withdrawn")

    # Grants

    def _grant(self, links: Collection[IncomingLink], now_ns: int) -> None:
        for link in links:
            if link.is_stale or link.is_broken:
                continue
            if link.wait_ns(now_ns):
                if link.name not in self.held_back:
                    self.held_back[link.name] = link
                    self._count("held_back", link.name)
                continue
            assert self.router is not None
            if self._reply(self.router, link.routing_id, seal(GRANT, self._incarnation, link.next_sequence)):
                link.on_granted()

    def grant_held_back(self, now_ns: int) -> None:
        """Grant what was held back and whose time has come."""
        ready = [link for link in self.held_back.values() if not link.wait_ns(now_ns)]
        for link in ready:
            del self.held_back[link.name]
        if ready:
            self._grant(ready, now_ns)
            self.has_more = True  # sending may have swallowed an edge

    def _reply(self, router: zmq.Socket[bytes], routing_id: bytes, frame: bytes) -> bool:
        try:
            router.send(routing_id, zmq.DONTWAIT | zmq.SNDMORE)
            router.send(frame, zmq.DONTWAIT)
        except zmq.ZMQError:
            return (
                False  # gone, or it does not read. Nothing is lost: it says hello again, or the next grant tells more
            )
        return True

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


def role_of(name: str) -> str:
    """What a peer is: the first word of its name, without a number: "executor 3" -> "executor"."""
    return name.partition(" ")[0].rstrip("0123456789").rstrip(".-_/")
