"""ZeroMQ's question who may connect (ZAP), answered from an allow-list, without a thread.

Source: rfc.zeromq.org/spec/27.
"""

from __future__ import annotations

import zmq
from zmq.utils import z85

from .curve import AllowList

ENDPOINT = "inproc://zeromq.zap.01"


class ZapHandler:
    """Answers for the sockets of one context; CURVE alone, and only keys of the list.

    Args:
        context: of this port alone: there is one handler a context.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allow_list: AllowList | None) -> None:
        self._allow_list = allow_list
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind(ENDPOINT)
        self.num_denied = 0

    def answer(self) -> None:
        """Answer all questions that are there."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            # routing id, empty, version, request id, domain, address, identity, mechanism, credentials...
            if len(frames) < 8:
                continue
            key = z85.encode(frames[8]).decode() if len(frames) == 9 and len(frames[8]) == 32 else ""
            is_allowed = frames[2] == b"1.0" and frames[7] == b"CURVE" and self._is_allowed(key)
            if not is_allowed:
                self.num_denied += 1
            status = (b"200", b"OK", key.encode()) if is_allowed else (b"400", b"not allowed", b"")
            self.socket.send_multipart([frames[0], b"", b"1.0", frames[3], *status, b""], zmq.DONTWAIT)

    def _is_allowed(self, key: str) -> bool:
        if self._allow_list is None:
            return False
        self._allow_list.reload()
        return self._allow_list.allows(key)
