"""Bounds of a port: everything that a peer could make grow."""

from __future__ import annotations

import msgspec


class PortLimits(msgspec.Struct, frozen=True):
    """What a port takes and holds at most.

    Attributes:
        max_message_bytes: of one message without its tensors; longer ones cost the peer its connection.
        max_tensors, max_tensor_bytes: tensors of a message, bytes of each. 0: none may come.
        window: messages of a peer under way and not yet taken, granted by the receiver.
        max_queued: messages that wait for one peer (under way, or for its grant); then `send` refuses.
        max_queued_bytes: the same in bytes.
        max_messages_per_s, max_bytes_per_s: of a peer, sustained; the receiver holds back its grant beyond.
        burst_s: how many seconds' worth may come at once.
        max_peers: links that a port serves.
        max_strangers: connections held that have not said hello; beyond, the oldest are shut.
        heartbeat_ms, heartbeat_timeout_ms: how often ZeroMQ pings a connection, and how long it waits for anything.
        handshake_ms: a connection that has not introduced itself by then is dropped.
        backlog: connections that wait to be accepted.
    """

    max_message_bytes: int = 16 << 20
    max_tensors: int = 0
    max_tensor_bytes: int = 256 << 20
    window: int = 1024
    max_queued: int = 8192
    max_queued_bytes: int = 256 << 20
    max_messages_per_s: int = 20_000
    max_bytes_per_s: int = 512 << 20
    burst_s: float = 1.0
    max_peers: int = 256
    max_strangers: int = 64
    heartbeat_ms: int = 1000
    heartbeat_timeout_ms: int = 4000
    handshake_ms: int = 3000
    backlog: int = 64


EDGE_LIMITS = PortLimits(window=128, max_messages_per_s=3_000, max_bytes_per_s=16 << 20, burst_s=0.25)
"""Of an edge, as its engine hears it. A request takes some messages and four bytes a token: that is a thousand requests
and four million tokens a second, more than an engine has a use for. What an edge that sends without end costs the
steps of all then: `python -m octavo.actors.runtime.bench_port`."""
