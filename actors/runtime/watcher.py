"""One descriptor that tells of many: ZeroMQ's sockets, and who reads each of them."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

import zmq

Reader = Callable[[], None]


class Watcher:
    """Calls readers of sockets that may have something. It belongs to one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: list[tuple[int, int]] = []  # what `wait` found, for `read_ready`
        self._readers: dict[int, Reader] = {}
        self._waker = -1  # an eventfd, once one was needed

    def fileno(self) -> int:
        """Readable when `read_ready` may have something to do."""
        return self._epoll.fileno()

    def watch(self, socket: zmq.Socket[bytes], reader: Reader | None) -> None:
        """Call a reader whenever a socket may have something; None: whoever waits here reads it himself."""
        descriptor = int(socket.get(zmq.FD))
        if reader is not None:
            self._readers[descriptor] = reader
        self._epoll.register(descriptor, select.EPOLLIN)

    def unwatch(self, socket: zmq.Socket[bytes]) -> None:
        """Do so no more."""
        descriptor = int(socket.get(zmq.FD))
        self._readers.pop(descriptor, None)
        self._epoll.unregister(descriptor)

    def wait(self, timeout_ms: int) -> bool:
        """Block until `read_ready` may have something to do; False: the time passed. A negative time is for ever."""
        self._ready = self._epoll.poll(timeout_ms / 1000 if timeout_ms >= 0 else -1)
        return bool(self._ready)

    def read_ready(self) -> None:
        """Call the readers of what is ready; never blocks."""
        ready, self._ready = self._ready, []
        for descriptor, _ in ready or self._epoll.poll(0):
            reader = self._readers.get(descriptor)
            if reader is not None:
                reader()

    def wake(self) -> None:
        """Have the descriptor tell of something, though there is nothing to read."""
        if self._waker < 0:
            self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._readers[self._waker] = self._note_woken
            self._epoll.register(self._waker, select.EPOLLIN)
        os.eventfd_write(self._waker, 1)

    def _note_woken(self) -> None:
        os.eventfd_read(self._waker)

    def close(self) -> None:
        """Give the descriptors back. Safe to call twice."""
        self._epoll.close()
        if self._waker >= 0:
            os.close(self._waker)
            self._waker = -1
