"""The outbound half of a port: a DEALER to each peer, and what the peer says about it on the same connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from ...messages.base import Message
from .curve import CurveKeys
from .endpoints import is_ipv6
from .outgoing_link import LinkSession, OutgoingLink
from .port_limits import PortLimits
from .port_record import PortRecord
from .socket_options import set_options
from .watcher import Watcher
from .wire import Encoder

# As plain integers: the enumeration's operators take a microsecond each.
_DONTWAIT: Final = int(zmq.DONTWAIT)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)

_MONITORED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class UnsendableError(ValueError):
    """No port would take this message: it is longer than any may be, or holds what cannot be written down."""


class Line(msgspec.Struct):
    """The sockets of an outgoing link."""

    link: OutgoingLink
    dealer: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]


class Lines:
    """The lines of one process.

    Args:
        name, incarnation: of this process.
        schema: this build's message hash.
        limits: of each line.
        keys: of this host, if it has some.
        context: that sockets are made in.
        watcher: that calls when one of them has something.
        record: where everything odd is counted.

    Attributes:
        by_peer: one to each peer.
    """

    def __init__(
        self,
        *,
        name: str,
        incarnation: int,
        schema: str,
        limits: PortLimits,
        keys: CurveKeys | None,
        context: zmq.Context[zmq.Socket[bytes]],
        watcher: Watcher,
        record: PortRecord,
    ) -> None:
        self.by_peer: dict[str, Line] = {}
        self._name = name
        self._incarnation = incarnation
        self._schema = schema
        self._limits = limits
        self._keys = keys
        self._context = context
        self._watcher = watcher
        self._counters = record.counters
        self._count = record.count
        self._report = record.report
        self._encoder = Encoder()
        self._sessions: dict[tuple[str, int], LinkSession] = {}

    def connect(self, peer: str, incarnation: int, endpoint: str, server_key: bytes) -> None:
        """Open the line to a peer, with whom there is none; `server_key` is empty where none is needed."""
        dealer = self._context.socket(zmq.DEALER)
        set_options(dealer, self._limits)
        dealer.set(zmq.IPV6, int(is_ipv6(endpoint)))
        dealer.set(zmq.RECONNECT_IVL, 10)
        dealer.set(zmq.RECONNECT_IVL_MAX, 500)
        dealer.set(zmq.CONNECT_TIMEOUT, self._limits.handshake_ms)  # the kernel's waits, then tries ever more seldom
        if server_key:
            assert self._keys is not None
            dealer.set(zmq.CURVE_SERVERKEY, server_key)
            dealer.set(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
            dealer.set(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        monitor = dealer.get_monitor_socket(_MONITORED)
        link = OutgoingLink(
            name=self._name,
            incarnation=self._incarnation,
            peer=peer,
            peer_incarnation=incarnation,
            socket=dealer,
            schema=self._schema,
            limits=self._limits,
            session=self._sessions.setdefault((peer, incarnation), LinkSession()),
        )
        line = self.by_peer[peer] = Line(link, dealer, monitor)
        self._watcher.watch(dealer, lambda: self.read(line))
        self._watcher.watch(monitor, lambda: self._read_monitor(line))
        dealer.connect(endpoint)
        link.flush()
        # A descriptor tells of what comes after the first look only (libzmq signals readers that found nothing).
        self._read_monitor(line)
        self.read(line)

    def disconnect(self, peer: str) -> None:
        """Close the line to a peer; what it had not taken is dropped. No line: nothing happens."""
        line = self.by_peer.pop(peer, None)
        if line is None:
            return
        self._watcher.unwatch(line.dealer)
        self._watcher.unwatch(line.monitor)
        line.dealer.disable_monitor()
        line.monitor.close(0)
        line.dealer.close(0)

    def forget_sessions(self, peer: str, *, before: int | None = None) -> None:
        """Count from 1 again with a peer, or with its incarnations before one, should there be a line again."""
        for key in [key for key in self._sessions if key[0] == peer and (before is None or key[1] < before)]:
            del self._sessions[key]

    def send(self, peer: str, message: Message) -> bool:
        """As of `Port`."""
        line = self.by_peer.get(peer)
        if line is None:
            self._counters["full"] += 1
            return False
        body, tensors = self._encode(message)
        is_sent = line.link.send(body, tensors)
        if not is_sent:
            self._count("full", peer)
        if _is_ready(line):
            self.read(line)
        return is_sent

    def _encode(self, message: Message) -> tuple[bytes, Sequence[memoryview]]:
        try:
            body, tensors = self._encoder.encode(message)
        except (msgspec.MsgspecError, ValueError, OverflowError) as error:  # a lone surrogate, an integer of 65 bits
            raise UnsendableError(f"a value cannot be sent: {error}") from error
        if len(body) > self._limits.max_message_bytes:
            # The peer would drop the connection each time that it is sent again.
            raise UnsendableError(
                f"a message of {len(body)} bytes is above the limit of {self._limits.max_message_bytes} bytes"
            )
        return body, tensors

    def read(self, line: Line) -> None:
        """Take what a peer says about our line to it."""
        link = line.link
        while not line.dealer.closed:
            try:
                frame = line.dealer.recv(_DONTWAIT)
            except zmq.Again:
                link.flush()
                if _is_ready(line):
                    continue
                return
            if line.dealer.get(zmq.RCVMORE):
                line.dealer.recv_multipart(zmq.DONTWAIT)
                self._count("multipart", link.peer)
                continue
            num_resent = link.num_resent
            what = link.on_frame(frame)
            self._counters["resent"] += link.num_resent - num_resent
            if what == "up":
                self._report(link.peer, "up")
            elif what == "refused":
                self._report(link.peer, "refused", link.why)
            elif what == "malformed":
                self._count("malformed", link.peer)

    def _read_monitor(self, line: Line) -> None:
        link = line.link
        while not line.monitor.closed:
            try:
                event = parse_monitor_message(line.monitor.recv_multipart(zmq.DONTWAIT))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                link.on_connected()
                self.read(line)
            elif event == zmq.EVENT_DISCONNECTED:
                if link.state in ("up", "greeting"):
                    self._report(link.peer, "lost")
                link.on_lost()
            else:
                self._count("handshake_failed", link.peer)
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    self._report(link.peer, "keys", "the peer's allow-list does not have our key")


def _is_ready(line: Line) -> bool:
    """Whether sending swallowed an edge: a grant came, or there is room again for what had to wait."""
    events = int(line.dealer.get(_EVENTS))
    return bool(events & _POLLIN or (events & _POLLOUT and line.link.is_held_up))
