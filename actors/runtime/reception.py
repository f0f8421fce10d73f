"""Who may speak to a port: hellos, and the names and keys that they claim."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import zmq

from ...messages.base import Message
from .curve import AllowList
from .envelope import (
    HEAD_BYTES,
    NOT_CONTROL,
    PROTOCOL_VERSION,
    REFUSE,
    RESET,
    WELCOME,
    Head,
    Hello,
    Refuse,
    Welcome,
    decode_hello,
    encode_control,
    seal,
)
from .incoming_link import IncomingLink
from .name_claims import Claim, NameClaims
from .port_limits import PortLimits
from .port_record import PortRecord
from .strangers import Strangers
from .wire import Decoder

Allowed = Mapping[str, Collection[type[Message]]]
"""Which messages a peer may send, by its name or its role: a role is a name without its number ("executor 3")."""

MAX_NAME_LENGTH: Final = 64


class Reception:
    """Judges hellos, and keeps the links of those that were welcomed.

    Args:
        name, incarnation: of this process.
        schema: this build's message hash.
        limits: of the port, and of peers that have none of their own.
        limits_of: window and rates of single peers or roles.
        allowed: what each peer may send; nobody else is heard.
        self_announced: roles of which the newest start takes the name at once, as nobody else tells of it.
        allow_list: CURVE keys that may connect, if there is a list.
        record: where everything odd is counted.

    Attributes:
        strangers: connections without a hello; None while nothing is bound.
        by_routing_id: links by their connection, those that broke or are stale as well.
    """

    def __init__(
        self,
        *,
        name: str,
        incarnation: int,
        schema: str,
        limits: PortLimits,
        limits_of: Mapping[str, PortLimits],
        allowed: Allowed,
        allow_list: AllowList | None,
        record: PortRecord,
        self_announced: Collection[str] = (),
    ) -> None:
        self.strangers: Strangers | None = None
        self.by_routing_id: dict[bytes, IncomingLink] = {}
        self._self_announced = frozenset(self_announced)
        self._name = name
        self._incarnation = incarnation
        self._schema = schema
        self._limits = limits
        self._limits_of = dict(limits_of)
        self._allowed = {peer: tuple(kinds) for peer, kinds in allowed.items()}
        self._allow_list = allow_list
        self._counters = record.counters
        self._count = record.count
        self._report = record.report
        self._incoming: dict[str, IncomingLink] = {}  # by name
        self._claims = NameClaims()
        self._keys_of: dict[str, str] = {}  # by name: the only key that may speak for it

    # What the process says of its peers

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

    def forget(self, peer: str) -> bool:
        """Keep nothing of a peer that has gone; False: it is connected, and nothing has happened."""
        link = self._incoming.get(peer)
        if link is not None and self.strangers is not None and self.strangers.has_welcomed(link.routing_id):
            return False
        if link is not None:
            self._retire(link)
        self._claims.forget(peer)
        self._keys_of.pop(peer, None)
        self.by_routing_id = {key: link for key, link in self.by_routing_id.items() if link.name != peer}
        return True

    def check_keys(self) -> None:
        """Look at the allow-list: links of withdrawn keys end."""
        if self._allow_list is None or not self._allow_list.reload():
            return
        for link in list(self._incoming.values()):
            if link.key and not (self._is_allowed(link.key) and self._may_speak_for(link.key, link.name)):
                self._retire(link)
                self._count("denied_key", link.name, "its key was withdrawn")

    # Hellos

    def hear_hello(
        self,
        router: zmq.Socket[bytes],
        head: Head,
        frame: bytes,
        *,
        routing_id: bytes,
        key: str,
        descriptor: int = -1,
    ) -> None:
        """Take a hello; a stranger's comes with the descriptor of its connection."""
        if head.version != PROTOCOL_VERSION:
            why = f"{self._name} speaks protocol version {PROTOCOL_VERSION}, the hello version {head.version}"
            self._refuse(router, routing_id, "version", why)
            return
        try:
            hello = decode_hello(memoryview(frame)[HEAD_BYTES:])
        except NOT_CONTROL:
            self._count("malformed")
            return
        inode = 0
        if self.strangers is not None:
            descriptor = self.strangers.descriptor_of(routing_id) if descriptor < 0 else descriptor
            self.strangers.read()  # that he came was said before he could say anything
            inode = self.strangers.inode_of(descriptor)
        self._consider(router, Claim(hello, head.incarnation, routing_id, key, descriptor, inode))

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

    def _is_allowed(self, key: str) -> bool:
        """Whether a key may connect still; without one, or without a list, everybody may."""
        return not key or self._allow_list is None or self._allow_list.allows(key)

    def _welcome(self, router: zmq.Socket[bytes], claim: Claim) -> None:
        hello, routing_id, key = claim.hello, claim.routing_id, claim.key
        limits = self._limits_of.get(hello.name) or self._limits_of.get(role_of(hello.name)) or self._limits
        link = self._incoming.get(hello.name)
        if link is None or (link.session, link.incarnation) != (hello.session, claim.incarnation):
            if link is not None:
                self._displace(router, link)
            link = self._claims.take_aside(claim)
        if link is not None:
            self.by_routing_id.pop(link.routing_id, None)
            link.on_hello(hello, routing_id, key)
            self._counters["reconnected"] += 1
        else:
            link = IncomingLink(
                hello=hello,
                incarnation=claim.incarnation,
                routing_id=routing_id,
                key=key,
                decoder=Decoder(self._allowed.get(hello.name) or self._allowed[role_of(hello.name)]),
                limits=limits,
            )
            self._report(hello.name, "heard")
        self._incoming[hello.name] = link
        if self.strangers is not None and claim.descriptor >= 0:
            self.strangers.welcome(claim.descriptor, routing_id)
        self.by_routing_id[routing_id] = link
        while len(self.by_routing_id) > 4 * self._limits.max_peers:  # retired ones, oldest first
            del self.by_routing_id[next(iter(self.by_routing_id))]
        welcome = encode_control(Welcome(self._name, hello.attempt, limits.window))
        reply(router, routing_id, seal(WELCOME, self._incarnation, link.next_sequence, welcome))

    def _refuse(self, router: zmq.Socket[bytes], routing_id: bytes, code: str, why: str, peer: str = "") -> None:
        self._count("refused_hello", peer, why)
        reply(router, routing_id, seal(REFUSE, self._incarnation, 0, encode_control(Refuse(code, why))))

    # Names that another has

    @property
    def has_parked(self) -> bool:
        """Whether anybody waits for a name."""
        return self._claims.has_parked

    def admit_parked(self, router: zmq.Socket[bytes]) -> bool:
        """Judge again those that wait for a name: one may have been announced, or the other's connection has ended.

        Not before all that has come is read: the last words of the other may be among it. Returns whether anything was
        said, which may have swallowed an edge.
        """
        has_spoken = False
        for claim in self._claims.take_parked():
            if not self._is_allowed(claim.key):
                self._refuse(router, claim.routing_id, "revoked", f"the key of {claim.hello.name} was withdrawn")
            elif self._must_wait(claim):
                self._claims.park(claim, self._is_open)
            elif self._is_open(claim):
                self._consider(router, claim)
                has_spoken = True
        return has_spoken

    def _is_open(self, claim: Claim) -> bool:
        """Whether the connection that a claim came by is there still."""
        return self.strangers is not None and 0 < claim.inode == self.strangers.inode_of(claim.descriptor)

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

    # Links that end, or begin again

    def break_link(self, router: zmq.Socket[bytes], link: IncomingLink) -> None:
        """Something is missing: nothing counts until the peer says hello again and sends from there."""
        link.is_broken = True
        reply(router, link.routing_id, seal(RESET, self._incarnation, link.next_sequence))

    def tell_stale(self, router: zmq.Socket[bytes], link: IncomingLink) -> None:
        """Let one that goes on after its end know, once."""
        if link.was_told:
            return
        link.was_told = True
        if self._is_allowed(link.key):
            self._refuse(router, link.routing_id, "stale", f"{link.name} {link.incarnation} was replaced")
        else:
            self._refuse(router, link.routing_id, "revoked", f"the key of {link.name} was withdrawn")

    def _retire(self, link: IncomingLink) -> None:
        link.is_stale = True
        if self._incoming.get(link.name) is link:
            del self._incoming[link.name]

    def _displace(self, router: zmq.Socket[bytes], link: IncomingLink) -> None:
        """Another has the name now; if it is not stale, this one may come back, and goes on where it was."""
        if link.incarnation < self._claims.announced(link.name):
            self._retire(link)
            return
        self.break_link(router, link)
        self._claims.set_aside(link)


def reply(router: zmq.Socket[bytes], routing_id: bytes, frame: bytes) -> bool:
    """Answer on a connection; False: it is gone, or is not read from.

    Nothing is lost by that: who is there says hello again, or the next grant tells more.
    """
    try:
        router.send(routing_id, zmq.DONTWAIT | zmq.SNDMORE)
        router.send(frame, zmq.DONTWAIT)
    except zmq.ZMQError:
        return False
    return True


def role_of(name: str) -> str:
    """What a peer is: the first word of its name, without a number: "executor 3" -> "executor"."""
    return name.partition(" ")[0].rstrip("0123456789").rstrip(".-_/")
