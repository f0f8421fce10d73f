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

import time
from collections.abc import Mapping
from pathlib import Path

import zmq

from ...messages.base import Message
from .curve import AllowList, CurveKeys, check_public_key
from .door import MAX_BATCH, Door
from .endpoints import check_endpoint, claim_ipc_path, is_ipv6, listen_error, resolved
from .lines import Lines, UnsendableError
from .port_limits import PortLimits
from .port_record import LinkEvent, PortRecord
from .reception import Allowed, Reception, role_of
from .schema import schema_hash
from .socket_options import set_options
from .strangers import Strangers
from .watcher import Watcher
from .zap import ZapHandler

__all__ = ["MAX_BATCH", "Allowed", "LinkEvent", "Port", "UnsendableError", "role_of"]

KEYS_INTERVAL_NS = 1_000_000_000


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
        self._limits = limits or PortLimits()
        self._keys = keys
        self._allow_plain_loopback = allow_plain_loopback
        schema = schema or schema_hash()
        self._context = zmq.Context()
        self._watcher = Watcher()
        self._bound_path: Path | None = None
        self._bound: list[str] = []  # ipc, tcp
        self._lines = Lines(
            name=name,
            incarnation=incarnation,
            schema=schema,
            limits=self._limits,
            keys=keys,
            context=self._context,
            watcher=self._watcher,
            record=record,
        )
        self._keys_checked_ns = 0
        self._allow_list: AllowList | None = None
        self._zap: ZapHandler | None = None
        if keys is not None:
            self._allow_list = AllowList(keys.allow_list) if keys.allow_list else None
            self._zap = ZapHandler(self._context, self._allow_list)
            self._watcher.watch(self._zap.socket, self._answer_zap)

        self._reception = Reception(
            name=name,
            incarnation=incarnation,
            schema=schema,
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
            self._watcher.watch(router, None)
            assert self._reception.strangers is not None
            self._watcher.watch(self._reception.strangers.monitor, self._reception.strangers.read)
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
        key = server_key if has_keys and endpoint.startswith("tcp://") else b""
        self.vouch(peer, key.decode("ascii"))
        self._lines.connect(peer, incarnation, endpoint, key)

    def disconnect(self, peer: str) -> None:
        """Close the line to a peer; what it had not taken is dropped. No line: nothing happens."""
        self._lines.disconnect(peer)

    def expect(self, peer: str, incarnation: int) -> None:
        """From now on a peer is stale below this incarnation; what an older one sends is dropped.

        A newer one that nobody expects is welcomed only while no other of that name is connected.
        """
        self._lines.forget_sessions(peer, before=incarnation)
        self._reception.expect(peer, incarnation)
        if self._reception.has_parked:
            self._watcher.wake()  # so that `receive` is called, which welcomes whoever has waited for this

    def forget(self, peer: str) -> bool:
        """Give back all that is kept of a peer which will not come back under its name, or as somebody new if it does.

        Returns:
            False: it is connected, and nothing has happened.
        """
        if not self._reception.forget(peer):
            return False
        self.disconnect(peer)
        self._lines.forget_sessions(peer)
        return True

    def vouch(self, peer: str, key: str) -> None:
        """From now on a peer's name may be used with this CURVE key alone; empty: by ipc or plain loopback alone."""
        self._reception.vouch(peer, key)

    def close(self) -> None:
        """Close every socket at once; what was not delivered is dropped."""
        for peer in list(self._lines.by_peer):
            self.disconnect(peer)
        if self._reception.strangers is not None:
            self._watcher.unwatch(self._reception.strangers.monitor)
        self._close_strangers()
        for socket in (self._door.router, self._zap.socket if self._zap else None):
            if socket is not None and not socket.closed:
                self._watcher.unwatch(socket)
                socket.close(0)
        if self._bound_path is not None:
            self._bound_path.unlink(missing_ok=True)
            self._bound_path = None
        if not self._context.closed:
            self._context.destroy(linger=0)
        self._watcher.close()

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
        return self._lines.send(peer, message)

    def is_up(self, peer: str) -> bool:
        """Whether the peer has welcomed us and the connection stands."""
        line = self._lines.by_peer.get(peer)
        return line is not None and line.link.state == "up"

    def num_queued(self, peer: str) -> int:
        """Messages that the peer has not taken yet (it says so in groups)."""
        line = self._lines.by_peer.get(peer)
        return len(line.link) if line is not None else 0

    # Receiving

    def fileno(self) -> int:
        """Readable when `receive` may have something. Call `receive` then, again while `has_more`."""
        return self._watcher.fileno()

    def wait(self, timeout_ms: int) -> bool:
        """Block until `receive` may have something; False: the time passed. A negative time waits for ever."""
        if self._door.has_more:
            return True
        delay_ms = self.delay_ms()
        is_due = delay_ms is not None and (timeout_ms < 0 or delay_ms <= timeout_ms)
        if is_due and delay_ms is not None:
            timeout_ms = delay_ms
        return self._watcher.wait(timeout_ms) or is_due

    def delay_ms(self) -> int | None:
        """When `receive` must be called even if nothing comes; None: need not."""
        return self._door.delay_ms(time.monotonic_ns())

    @property
    def has_more(self) -> bool:
        """Whether `receive` stopped at its bound: no edge will announce the rest."""
        return self._door.has_more

    def receive(self, max_messages: int = MAX_BATCH) -> list[tuple[str, Message]]:
        """What is there, in each peer's order; never blocks. `has_more` says whether the bound cut it short."""
        self._watcher.read_ready()
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
