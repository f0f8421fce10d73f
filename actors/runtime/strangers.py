"""Connections that somebody has opened and not introduced himself by: at most so many are held."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


class Strangers:
    """The connections of a listening socket from which no hello was welcomed yet.

    ZeroMQ accepts whoever comes, and drops those that do not finish its own handshake in time; as many as like may come
    meanwhile, and who has finished it may stay. So its monitor's account is kept here, and beyond the bound the oldest
    connections are shut: those who mean it come again.

    Args:
        router: the listening socket, before it is bound.
        most: connections held.
    """

    def __init__(self, router: zmq.Socket[bytes], most: int) -> None:
        self._router = router
        self._most = most
        self._held: dict[int, int] = {}  # inode of the connection by its descriptor, the oldest first
        self._welcomed: dict[int, tuple[int, bytes]] = {}  # inode and routing id by descriptor
        # Unbounded, as its writer is the thread that carries everybody's messages: it must never wait for us.
        self.monitor: zmq.Socket[bytes] = router.context.socket(zmq.PAIR)
        self.monitor.set(zmq.RCVHWM, 0)
        self.monitor.linger = 0
        address = f"inproc://strangers-{os.urandom(8).hex()}"
        router.monitor(address, _EVENTS)
        self.monitor.connect(address)

    def __len__(self) -> int:
        return len(self._held)

    def read(self) -> None:
        """Take note of who came and went."""
        while not self.monitor.closed:
            try:
                event = parse_monitor_message(self.monitor.recv_multipart(zmq.DONTWAIT))
            except zmq.Again:
                return
            descriptor = int(event["value"])
            self._held.pop(descriptor, None)
            self._welcomed.pop(descriptor, None)
            if event["event"] == zmq.EVENT_ACCEPTED:
                # Closed already, or another file's by now: then the news of that is behind this.
                with contextlib.suppress(OSError):
                    self._held[descriptor] = os.fstat(descriptor).st_ino

    def welcome(self, descriptor: int, routing_id: bytes) -> None:
        """Whoever speaks through this connection is no stranger any more."""
        self.read()  # that he came was said before he could say anything
        self._welcomed[descriptor] = (self.inode_of(descriptor), routing_id)
        self._held.pop(descriptor, None)

    def inode_of(self, descriptor: int) -> int:
        """What tells a connection from others that had the same descriptor; 0: it is not there, as far as was told."""
        return self._held.get(descriptor) or self._welcomed.get(descriptor, (0, b""))[0]

    def has_welcomed(self, routing_id: bytes) -> bool:
        """Whether one who was welcomed is still connected, as far as was told."""
        return self.descriptor_of(routing_id) >= 0

    def descriptor_of(self, routing_id: bytes) -> int:
        """The connection of one who was welcomed; -1: there is none."""
        return next((descriptor for descriptor, (_, other) in self._welcomed.items() if other == routing_id), -1)

    def shut(self, descriptor: int) -> None:
        """Shut a stranger's connection: if he means it, he comes again."""
        if descriptor in self._held:
            _shut(descriptor, self._held.pop(descriptor))

    def shut_oldest(self) -> int:
        """Shut as many connections as are too many, and return their number."""
        num_shut = 0
        while len(self._held) > self._most:
            descriptor = next(iter(self._held))
            num_shut += _shut(descriptor, self._held.pop(descriptor))
        return num_shut

    def close(self) -> None:
        """Stop listening to the monitor, before the router is closed."""
        self._router.disable_monitor()
        self.monitor.close(0)


def _shut(descriptor: int, inode: int) -> bool:
    """Shut a connection that is ZeroMQ's to close, unless its descriptor means another file by now."""
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return False
    with connection:
        if os.fstat(connection.fileno()).st_ino != inode:
            return False
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    return True
