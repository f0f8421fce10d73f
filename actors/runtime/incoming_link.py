"""One peer to listen to: whether it may speak, what must come next, and how much it may still send."""

from __future__ import annotations

from .envelope import Hello
from .port_limits import PortLimits
from .wire import Decoder

GRANTS_PER_WINDOW = 4


class IncomingLink:
    """What a port knows of a peer that said hello.

    Args:
        hello: what it said.
        routing_id: of its connection.
        decoder: of what it may send.
    """

    def __init__(
        self, *, hello: Hello, incarnation: int, routing_id: bytes, key: str, decoder: Decoder, limits: PortLimits
    ) -> None:
        self.name = hello.name
        self.incarnation = incarnation
        self.session = hello.session
        self.attempt = hello.attempt
        self.routing_id = routing_id
        self.key = key  # CURVE public key of the connection; empty without
        self.decoder = decoder
        self.next_sequence = hello.first_sequence
        self.is_broken = False  # a gap: nothing counts until the next hello
        self.is_stale = False  # a newer incarnation took its place, or its key was withdrawn
        self.was_told = False  # of either
        self._limits = limits
        self._granted = hello.first_sequence  # all before were granted
        self._bytes_since_grant = 0
        self._grant_every = max(1, min(limits.window, hello.max_queued) // GRANTS_PER_WINDOW)
        self._grant_every_bytes = max(1, min(limits.max_queued_bytes, hello.max_queued_bytes) // GRANTS_PER_WINDOW)
        self._paid_until_ns = 0
        self._message_ns = 10**9 // limits.max_messages_per_s
        self._byte_ns = 10**9 / limits.max_bytes_per_s
        self._burst_ns = int(limits.burst_s * 10**9)

    def is_beyond_window(self, sequence: int) -> bool:
        """Whether the peer sends more than it was granted."""
        return sequence >= self._granted + self._limits.window

    def take(self, num_bytes: int, now_ns: int) -> None:
        """Count a message that was in sequence."""
        self.next_sequence += 1
        self._bytes_since_grant += num_bytes
        cost_ns = max(self._message_ns, int(num_bytes * self._byte_ns))
        self._paid_until_ns = max(self._paid_until_ns, now_ns - self._burst_ns) + cost_ns

    @property
    def is_grant_due(self) -> bool:
        """Whether enough came for the next grant."""
        return (
            self.next_sequence - self._granted >= self._grant_every
            or self._bytes_since_grant >= self._grant_every_bytes
        )

    def wait_ns(self, now_ns: int) -> int:
        """How long the peer's rate asks to hold back the next grant; 0: not at all."""
        return max(0, self._paid_until_ns - now_ns)

    def on_granted(self) -> None:
        """The peer was told that the window begins at `next_sequence`."""
        self._granted = self.next_sequence
        self._bytes_since_grant = 0

    def on_hello(self, hello: Hello, routing_id: bytes, key: str) -> None:
        """The same process said hello again; it may have given up messages it never sent (it says so)."""
        self.attempt = hello.attempt
        self.routing_id = routing_id
        self.key = key
        self.next_sequence = max(self.next_sequence, hello.first_sequence)
        self.is_broken = self.was_told = False
        self.on_granted()
