"""The ZeroMQ mailbox of a process: one door in, one line out to each peer.

Inbound is one ROUTER, outbound one DEALER a peer; what the peer has to say about a link (welcome, refusal, grants)
comes back on the same connection. Messages are plain values at both ends. The port knows no event loop: `asyncio_port`
ties it to one, a blocking process uses `wait` and `receive`. It belongs to one thread.

A link begins with a hello: protocol version, schema, names and incarnations, a secret. Messages are numbered. What
comes twice is dropped; what is missing breaks the link until its sender says hello again and goes on from where the
receiver is. Messages stay with their sender until the receiver has granted room behind them, so neither a torn
connection nor a gap loses or repeats any, as long as both processes live. When one dies, what it had is gone with it:
upper layers begin again with a new incarnation, and nothing of the old one is taken.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from ...messages.base import Message
from .curve import AllowList, CurveKeys, check_public_key
from .door import MAX_BATCH, Door
from .endpoints import check_endpoint, claim_ipc_path, is_ipv6, listen_error, resolved
from .outgoing_link import LinkSession, OutgoingLink
from .port_limits import PortLimits
from .port_record import LinkEvent, PortRecord
from .reception import Allowed, Reception, role_of
from .schema import schema_hash
from .socket_options import set_options
from .strangers import Strangers
from .wire import Encoder
from .zap import ZapHandler

__all__ = ["MAX_BATCH", "Allowed", "LinkEvent", "Port", "UnsendableError", "role_of"]

KEYS_INTERVAL_NS = 1_000_000_000

# As plain integers: the enumeration's operators take a microsecond each.
_DONTWAIT: Final = int(zmq.DONTWAIT)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)

_Reader = Callable[[], None]


class UnsendableError(ValueError):
    """No port would take this message: it is longer than any may be, or holds what cannot be written down."""


class Port:
    """Sends and receives messages for one process.

    Args:
        name: of this process, unique in the graph ("engine", "executor 0").
        incarnation: of this start of it, increasing.
        keys: CURVE keys; needed for `tcp://` beyond loopback.
        allowed: what each peer may send here. Deny by default: an unknown peer is refused.
        allow_plain_loopback: let `tcp://127.0.0.1` do without keys.
        schema: this build's message hash (given by tests).
        self_announced: roles whose newest start takes the place of one that is connected without being expected.
        limits_of: of single peers or roles, where they are not `limits`: their window and rates.
    """

    def __init__(
        self,
        name: str,
        incarnation: int,
        *,
        keys: CurveKeys | None = None,
        allowed: Allowed | None = None,
        limits: PortLimits | None = None,
        allow_plain_loopback: bool = False,
        schema: str = "",
        self_announced: tuple[str, ...] = (),
        limits_of: Mapping[str, PortLimits] | None = None,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        record = PortRecord(name)
        self.counters = record.counters
        self.events = record.events
        self._count = record.count
        self._report = record.report
        self._limits = limits or PortLimits()
        self._keys = keys
        self._allow_plain_loopback = allow_plain_loopback
        self._schema = schema or schema_hash()
        self._encoder = Encoder()
        self._context = zmq.Context()
        self._epoll = select.epoll()
        self._ready: list[tuple[int, int]] = []  # what `wait` found, for `receive`
        self._on_ready: dict[int, _Reader] = {}
        self._waker = -1  # an eventfd, once one was needed
        self._bound_path: Path | None = None
        self._bound: list[str] = []  # ipc, tcp
        self._outgoing: dict[str, _Line] = {}
        self._sessions: dict[tuple[str, int], LinkSession] = {}
        self._keys_checked_ns = 0
        self._allow_list: AllowList | None = None
        self._zap: ZapHandler | None = None
        if keys is not None:
            self._allow_list = AllowList(keys.allow_list) if keys.allow_list else None
            self._zap = ZapHandler(self._context, self._allow_list)
            self._watch(self._zap.socket, self._answer_zap)

        self._reception = Reception(
            name=name,
            incarnation=incarnation,
            schema=self._schema,
            limits=self._limits,
            limits_of=limits_of or {},
            allowed=allowed or {},
            allow_list=self._allow_list,
            record=record,
            self_announced=self_announced,
        )
        self._door = Door(
            incarnation=incarnation,
            reception=self._reception,
            limits=self._limits,
            has_keys=keys is not None,
            record=record,
        )

    # Set-up

    def bind(self, endpoint: str) -> str:
        """Listen; once by each of `ipc://` and `tcp://`, where keys are asked for by TCP alone. Returns the endpoint
        with its real TCP port.

        Raises:
            InvalidConfigError: others could reach the endpoint, its path is not ours to take, or this host has no such
                address.
            OSError: the address is in use.
        """
        scheme = endpoint.partition("://")[0]
        if self._door.router is None:
            self._bound.clear()
        assert scheme not in self._bound, "a port binds once by each kind of endpoint"
        endpoint = self._checked(endpoint)
        router = self._door.router or self._make_router()
        # Options are those of the endpoints that are bound from here on.
        router.set(zmq.IPV6, int(is_ipv6(endpoint)))
        router.set(zmq.CURVE_SERVER, 0)
        if self._keys is not None and endpoint.startswith("tcp://"):
            router.set(zmq.CURVE_SERVER, 1)
            router.set(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
            router.set(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        try:
            if endpoint.startswith("ipc://"):
                self._bound_path = Path(endpoint.removeprefix("ipc://"))
                claim_ipc_path(self._bound_path)
            router.bind(endpoint)
            if self._bound_path is not None:
                self._bound_path.chmod(0o600)
        except BaseException as error:
            if self._door.router is None:
                self._close_strangers()
                router.close(0)
            if scheme == "ipc":
                self._bound_path = None
            if isinstance(error, zmq.ZMQError):
                raise listen_error(endpoint, error.errno or 0, error.strerror) from error
            raise
        self._bound.append(scheme)
        if self._door.router is None:
            self._door.router = router
            self._watch(router, None)
            assert self._reception.strangers is not None
            self._watch(self._reception.strangers.monitor, self._reception.strangers.read)
            self._reception.strangers.read()  # a descriptor tells of what comes after the first look only
        last = router.get(zmq.LAST_ENDPOINT)
        assert isinstance(last, bytes)
        return last.rstrip(b"\0").decode()

    def _checked(self, endpoint: str) -> str:
        """An endpoint that may be listened to, with an address for a name, which must be allowed as well."""
        for checked in (endpoint, resolved(endpoint)):
            check_endpoint(checked, has_keys=self._keys is not None, allow_plain_loopback=self._allow_plain_loopback)
        return checked

    def _make_router(self) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        set_options(router, self._limits)
        router.set(zmq.ROUTER_MANDATORY, 1)  # no ROUTER_HANDOVER: nobody takes another's place
        router.set(zmq.BACKLOG, self._limits.backlog)
        self._reception.strangers = Strangers(router, self._limits.max_strangers)
        return router

    def connect(self, peer: str, incarnation: int, endpoint: str, *, server_key: bytes = b"") -> None:
        """Open the line to a peer; messages may be sent at once, they wait for the welcome.

        Replaces the line to an earlier incarnation of it, whose messages no longer count from now on. What is reached
        by ipc is heard by ipc alone, and what is reached by TCP with its own key alone.

        Args:
            incarnation: of the peer; 0: whichever answers first, and from then on no other.
            server_key: the peer's CURVE public key (Z85), for `tcp://`.

        Raises:
            InvalidConfigError: the endpoint needs keys.
        """
        has_keys = self._keys is not None and bool(server_key)
        check_endpoint(endpoint, has_keys=has_keys, allow_plain_loopback=self._allow_plain_loopback)
        if has_keys:
            check_public_key(server_key.decode("ascii", "replace"))
        self.disconnect(peer)
        self.expect(peer, incarnation)
        self.vouch(peer, server_key.decode("ascii") if has_keys and endpoint.startswith("tcp://") else "")
        dealer = self._context.socket(zmq.DEALER)
        set_options(dealer, self._limits)
        dealer.set(zmq.IPV6, int(is_ipv6(endpoint)))
        dealer.set(zmq.RECONNECT_IVL, 10)
        dealer.set(zmq.RECONNECT_IVL_MAX, 500)
        dealer.set(zmq.CONNECT_TIMEOUT, self._limits.handshake_ms)  # the kernel's waits, then tries ever more seldom
        if has_keys and endpoint.startswith("tcp://"):
            assert self._keys is not None
            dealer.set(zmq.CURVE_SERVERKEY, server_key)
            dealer.set(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
            dealer.set(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        monitor = dealer.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        session = self._sessions.setdefault((peer, incarnation), LinkSession())
        link = OutgoingLink(
            name=self.name,
            incarnation=self.incarnation,
            peer=peer,
            peer_incarnation=incarnation,
            socket=dealer,
            schema=self._schema,
            limits=self._limits,
            session=session,
        )
        line = _Line(link, dealer, monitor)
        self._outgoing[peer] = line
        self._watch(dealer, lambda: self._read_line(line))
        self._watch(monitor, lambda: self._read_monitor(line))
        dealer.connect(endpoint)
        link.flush()
        # A descriptor tells of what comes after the first look only (libzmq signals readers that found nothing).
        self._read_monitor(line)
        self._read_line(line)

    def disconnect(self, peer: str) -> None:
        """Close the line to a peer; what it had not taken is dropped. No line: nothing happens."""
        line = self._outgoing.pop(peer, None)
        if line is None:
            return
        self._unwatch(line.dealer)
        self._unwatch(line.monitor)
        line.dealer.disable_monitor()
        line.monitor.close(0)
        line.dealer.close(0)

    def expect(self, peer: str, incarnation: int) -> None:
        """From now on a peer is stale below this incarnation; what an older one sends is dropped.

        A newer one that nobody expects is welcomed only while no other of that name is connected.
        """
        for key in [key for key in self._sessions if key[0] == peer and key[1] < incarnation]:
            del self._sessions[key]
        self._reception.expect(peer, incarnation)
        if self._reception.has_parked:
            self._wake()

    def forget(self, peer: str) -> bool:
        """Give back all that is kept of a peer which will not come back under its name, or as somebody new if it does.

        Returns:
            False: it is connected, and nothing has happened.
        """
        if not self._reception.forget(peer):
            return False
        self.disconnect(peer)
        for key in [key for key in self._sessions if key[0] == peer]:
            del self._sessions[key]
        return True

    def vouch(self, peer: str, key: str) -> None:
        """From now on a peer's name may be used with this CURVE key alone; empty: by ipc or plain loopback alone."""
        self._reception.vouch(peer, key)

    def _wake(self) -> None:
        """Have `receive` called, which welcomes whoever has waited for this."""
        if self._waker < 0:
            self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._on_ready[self._waker] = self._note_woken
            self._epoll.register(self._waker, select.EPOLLIN)
        os.eventfd_write(self._waker, 1)

    def _note_woken(self) -> None:
        os.eventfd_read(self._waker)

    def close(self) -> None:
        """Close every socket at once; what was not delivered is dropped."""
        for peer in list(self._outgoing):
            self.disconnect(peer)
        if self._reception.strangers is not None:
            self._unwatch(self._reception.strangers.monitor)
        self._close_strangers()
        for socket in (self._door.router, self._zap.socket if self._zap else None):
            if socket is not None and not socket.closed:
                self._unwatch(socket)
                socket.close(0)
        if self._bound_path is not None:
            self._bound_path.unlink(missing_ok=True)
            self._bound_path = None
        if not self._context.closed:
            self._context.destroy(linger=0)
        self._epoll.close()
        if self._waker >= 0:
            os.close(self._waker)
            self._waker = -1

    def _close_strangers(self) -> None:
        if self._reception.strangers is not None:
            self._reception.strangers.close()
            self._reception.strangers = None

    # Sending

    def send(self, peer: str, message: Message) -> bool:
        """Send, or queue until the peer has room.

        Returns:
            False (and counted): no line to it, it refused us, or the queue's bound is reached.

        Raises:
            UnsendableError: the message itself is at fault; nothing was sent.
        """
        line = self._outgoing.get(peer)
        if line is None:
            self.counters["full"] += 1
            return False
        body, tensors = self._encode(message)
        is_sent = line.link.send(body, tensors)
        if not is_sent:
            self._count("full", peer)
        if self._is_ready(line):
            self._read_line(line)
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

    def is_up(self, peer: str) -> bool:
        """Whether the peer has welcomed us and the connection stands."""
        line = self._outgoing.get(peer)
        return line is not None and line.link.state == "up"

    def num_queued(self, peer: str) -> int:
        """Messages that the peer has not taken yet (it says so in groups)."""
        line = self._outgoing.get(peer)
        return len(line.link) if line is not None else 0

    # Receiving

    def fileno(self) -> int:
        """Readable when `receive` may have something. Call `receive` then, again while `has_more`."""
        return self._epoll.fileno()

    def wait(self, timeout_ms: int) -> bool:
        """Block until `receive` may have something; False: the time passed. A negative time waits for ever."""
        if self._door.has_more:
            return True
        delay_ms = self.delay_ms()
        is_due = delay_ms is not None and (timeout_ms < 0 or delay_ms <= timeout_ms)
        if is_due and delay_ms is not None:
            timeout_ms = delay_ms
        self._ready = self._epoll.poll(timeout_ms / 1000 if timeout_ms >= 0 else -1)
        return is_due or bool(self._ready)

    def delay_ms(self) -> int | None:
        """When `receive` must be called even if nothing comes; None: need not."""
        return self._door.delay_ms(time.monotonic_ns())

    @property
    def has_more(self) -> bool:
        """Whether `receive` stopped at its bound: no edge will announce the rest."""
        return self._door.has_more

    def receive(self, max_messages: int = MAX_BATCH) -> list[tuple[str, Message]]:
        """What is there, in each peer's order; never blocks. `has_more` says whether the bound cut it short."""
        ready, self._ready = self._ready, []
        for descriptor, _ in ready or self._epoll.poll(0):
            reader = self._on_ready.get(descriptor)
            if reader is not None:
                reader()
        if self._door.router is None:
            return []
        now_ns = time.monotonic_ns()
        if self._allow_list is not None and now_ns - self._keys_checked_ns > KEYS_INTERVAL_NS:
            self._keys_checked_ns = now_ns
            self._reception.check_keys()
        messages: list[tuple[str, Message]] = []
        self._door.read(self._door.router, messages, max_messages, now_ns)
        self._door.grant_held_back(now_ns)
        self._door.attend()
        return messages

    def check_keys(self) -> None:
        """Look at the allow-list now: links of withdrawn keys end."""
        if self._allow_list is not None:
            self._reception.check_keys()

    def _answer_zap(self) -> None:
        assert self._zap is not None
        num_denied = self._zap.num_denied
        self._zap.answer()
        for _ in range(self._zap.num_denied - num_denied):
            self._count("denied_key", "", "a key that is not on the allow-list")

    # Sockets

    def _is_ready(self, line: _Line) -> bool:
        """Whether sending swallowed an edge: a grant came, or there is room again for what had to wait."""
        events = int(line.dealer.get(_EVENTS))
        return bool(events & _POLLIN or (events & _POLLOUT and line.link.is_held_up))

    def _read_line(self, line: _Line) -> None:
        """Take what a peer says about our line to it."""
        link = line.link
        while not line.dealer.closed:
            try:
                frame = line.dealer.recv(_DONTWAIT)
            except zmq.Again:
                link.flush()
                if self._is_ready(line):
                    continue
                return
            if line.dealer.get(zmq.RCVMORE):
                line.dealer.recv_multipart(zmq.DONTWAIT)
                self._count("multipart", link.peer)
                continue
            num_resent = link.num_resent
            what = link.on_frame(frame)
            self.counters["resent"] += link.num_resent - num_resent
            if what == "up":
                self._report(link.peer, "up")
            elif what == "refused":
                self._report(link.peer, "refused", link.why)
            elif what == "malformed":
                self._count("malformed", link.peer)

    def _read_monitor(self, line: _Line) -> None:
        link = line.link
        while not line.monitor.closed:
            try:
                event = parse_monitor_message(line.monitor.recv_multipart(zmq.DONTWAIT))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                link.on_connected()
                self._read_line(line)
            elif event == zmq.EVENT_DISCONNECTED:
                if link.state in ("up", "greeting"):
                    self._report(link.peer, "lost")
                link.on_lost()
            else:
                self._count("handshake_failed", link.peer)
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    self._report(link.peer, "keys", "the peer's allow-list does not have our key")

    def _watch(self, socket: zmq.Socket[bytes], reader: _Reader | None) -> None:
        descriptor = int(socket.get(zmq.FD))
        if reader is not None:
            self._on_ready[descriptor] = reader
        self._epoll.register(descriptor, select.EPOLLIN)

    def _unwatch(self, socket: zmq.Socket[bytes]) -> None:
        descriptor = int(socket.get(zmq.FD))
        self._on_ready.pop(descriptor, None)
        self._epoll.unregister(descriptor)


class _Line(msgspec.Struct):
    """The sockets of an outgoing link."""

    link: OutgoingLink
    dealer: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
