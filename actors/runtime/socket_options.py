"""How every socket of a port is set up."""

from __future__ import annotations

import zmq

from .envelope import HEAD_BYTES
from .port_limits import PortLimits


def set_options(socket: zmq.Socket[bytes], limits: PortLimits) -> None:
    """Bounds and heartbeats. ZeroMQ's own defaults are no size limit, endless lingering and no heartbeat."""
    largest = limits.max_message_bytes + HEAD_BYTES
    socket.set(zmq.MAXMSGSIZE, max(largest, limits.max_tensor_bytes) if limits.max_tensors else largest)
    socket.set(zmq.SNDHWM, 2 * limits.window)
    socket.set(zmq.RCVHWM, 2 * limits.window)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.HEARTBEAT_IVL, limits.heartbeat_ms)
    socket.set(zmq.HEARTBEAT_TIMEOUT, limits.heartbeat_timeout_ms)
    socket.set(zmq.HEARTBEAT_TTL, limits.heartbeat_timeout_ms)
    socket.set(zmq.HANDSHAKE_IVL, limits.handshake_ms)
