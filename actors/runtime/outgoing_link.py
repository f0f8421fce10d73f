"""One peer to talk to: what waits for it, what is under way, and how a torn connection is taken up again."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Final, Literal

import zmq

from .envelope import (
    DATA,
    GRANT,
    HEAD_BYTES,
    HELLO,
    NOT_CONTROL,
    PROTOCOL_VERSION,
    REFUSE,
    RESET,
    WELCOME,
    Hello,
    NotAnEnvelopeError,
    Refuse,
    decode_refuse,
    decode_welcome,
    encode_control,
    seal,
    unseal,
)
from .port_limits import PortLimits

LinkState = Literal["greeting", "up", "lost", "refused"]

Frames = tuple[bytes | memoryview, ...]

_DONTWAIT: Final = int(zmq.DONTWAIT)  # a plain integer: the enumeration's operators take a microsecond each


class OutgoingLink:
    """Sends messages to one peer through a DEALER, each once and in order.

    A message is kept until the peer has granted room behind it, which says that the peer took it. After a torn
    connection, or when the peer asks for it, the link says hello again and goes on from the message that the peer
    names: nothing is lost as long as both processes live.

    Args:
        name, incarnation: of this process.
        peer, peer_incarnation: whom to talk to; a welcome of anybody else is refused. 0: whichever incarnation welcomes
            us first, and from then on no other.
        socket: a connected DEALER of this link's own.
        schema: this build's message hash.
        session: new, or what a former link to the same incarnation used.
    """

    def __init__(
        self,
        *,
        name: str,
        incarnation: int,
        peer: str,
        peer_incarnation: int,
        socket: zmq.Socket[bytes],
        schema: str,
        limits: PortLimits,
        session: LinkSession,
    ) -> None:
        self.peer = peer
        self.peer_incarnation = peer_incarnation
        self.state: LinkState = "greeting"
        self.why = ""  # of a refusal
        self.num_resent = 0
        self.session = session
        self._name = name
        self._incarnation = incarnation
        self._socket = socket
        self._schema = schema
        self._limits = limits
        self._waiting: deque[Frames] = deque()  # not sent yet, or to be sent again
        self._under_way: deque[Frames] = deque()  # sent, not granted
        self._first_under_way = self.session.next_sequence
        self._num_bytes = 0
        self._window = 0
        self._is_hello_due = True

    def __len__(self) -> int:
        return len(self._waiting) + len(self._under_way)

    def send(self, body: bytes, tensors: Sequence[memoryview] = ()) -> bool:
        """Send a message, or queue it until there is room; False: the queue's bound is reached, or it was refused."""
        num_bytes = len(body)
        for tensor in tensors:
            num_bytes += tensor.nbytes
        if (
            self.state == "refused"
            or len(self) >= self._limits.max_queued
            or self._num_bytes + num_bytes > self._limits.max_queued_bytes
        ):
            return False
        sequence = self.session.next_sequence
        self.session.next_sequence = sequence + 1
        self._num_bytes += num_bytes
        self._waiting.append((seal(DATA, self._incarnation, sequence, body, len(tensors)), *tensors))
        self.flush()
        return True

    def flush(self) -> None:
        """Give ZeroMQ as much as the peer's grant allows."""
        if self._is_hello_due:
            self._say_hello()
        if self.state != "up":
            return
        waiting, under_way, window = self._waiting, self._under_way, self._window
        while waiting and len(under_way) < window:
            frames = waiting[0]
            try:
                if len(frames) == 1:
                    self._socket.send(frames[0], _DONTWAIT)
                else:
                    self._socket.send(frames[0], zmq.DONTWAIT | zmq.SNDMORE)
                    for tensor in frames[1:-1]:
                        self._socket.send(tensor, zmq.DONTWAIT | zmq.SNDMORE, copy=False)
                    self._socket.send(frames[-1], zmq.DONTWAIT, copy=False)
            except zmq.Again:  # the high-water mark: a grant or the connection's return will call again
                return
            under_way.append(waiting.popleft())

    @property
    def is_held_up(self) -> bool:
        """Whether something could leave if ZeroMQ took it."""
        return self._is_hello_due or (
            self.state == "up" and bool(self._waiting) and len(self._under_way) < self._window
        )

    def on_lost(self) -> None:
        """The connection was torn; ZeroMQ tries to connect again."""
        if self.state != "refused":
            self.state = "lost"

    def on_connected(self) -> None:
        """There is a connection (again)."""
        if self.state == "lost":
            self.greet()

    def greet(self) -> None:
        """Say hello (again); what is under way will be sent again from where the peer says."""
        self.state = "greeting"
        self._is_hello_due = True
        self.flush()

    def on_frame(self, frame: bytes) -> str:
        """Take what the peer sent back; returns what happened: "", "up", "refused", "reset" or "malformed"."""
        try:
            head = unseal(frame)
        except NotAnEnvelopeError:
            if self.state in ("up", "greeting"):
                self.greet()  # it may have been a welcome, or have asked for what is missing
            return "malformed"
        if head.kind == REFUSE:  # of any version: its body stays as it is
            return self._on_refuse(frame)
        if head.version != PROTOCOL_VERSION:
            return "malformed"
        if head.kind == WELCOME and not self.peer_incarnation:
            self.peer_incarnation = head.incarnation
        if head.incarnation != self.peer_incarnation:
            return self._refuse("stale", f"{self.peer}'s endpoint is served by incarnation {head.incarnation}")
        if head.kind == GRANT:
            if self.state == "up" and not self._forget_before(head.sequence):
                return "malformed"
            self.flush()
            return ""
        if head.kind == WELCOME:
            return self._on_welcome(frame, head.sequence)
        if head.kind == RESET:
            if self.state != "up":  # it crossed our hello
                return ""
            self.greet()
            return "reset"
        return "malformed"

    def _on_welcome(self, frame: bytes, next_sequence: int) -> str:
        try:
            welcome = decode_welcome(memoryview(frame)[HEAD_BYTES:])
        except NOT_CONTROL:
            return "malformed"
        if welcome.name != self.peer:
            return self._refuse("foreign", f"{self.peer}'s endpoint is served by {welcome.name!r}")
        if self.state != "greeting" or welcome.attempt != self.session.attempt:
            return ""  # to an earlier hello
        self._waiting.extendleft(reversed(self._under_way))
        num_sent = len(self._under_way)
        self._under_way.clear()
        self._first_under_way = self.session.next_sequence - len(self._waiting)
        num_before = len(self._waiting)
        if not self._forget_waiting_before(next_sequence):
            return self._refuse("gap", f"{self.peer} waits for message {next_sequence}, which there is not")
        self.num_resent += max(0, num_sent - (num_before - len(self._waiting)))
        self._window = welcome.window
        self.state = "up"
        self.flush()
        return "up"

    def _on_refuse(self, frame: bytes) -> str:
        try:
            refuse = decode_refuse(memoryview(frame)[HEAD_BYTES:])
        except NOT_CONTROL:
            refuse = Refuse("refused", "for a reason that this build cannot read")
        return self._refuse(refuse.code, refuse.why)

    def _refuse(self, code: str, why: str) -> str:
        self.state = "refused"
        self.why = f"{code}: {why}"
        self._waiting.clear()
        self._under_way.clear()
        self._num_bytes = 0
        return "refused"

    def _forget_before(self, sequence: int) -> bool:
        """The peer took all before `sequence`; False: it names a message that was not sent."""
        num_taken = sequence - self._first_under_way
        if num_taken > len(self._under_way):
            return False
        for _ in range(num_taken):
            self._forget(self._under_way.popleft())
        self._first_under_way = max(sequence, self._first_under_way)
        return True

    def _forget_waiting_before(self, sequence: int) -> bool:
        num_taken = sequence - self._first_under_way
        if not 0 <= num_taken <= len(self._waiting):
            return False
        for _ in range(num_taken):
            self._forget(self._waiting.popleft())
        self._first_under_way = sequence
        return True

    def _forget(self, frames: Frames) -> None:
        self._num_bytes -= len(frames[0]) - HEAD_BYTES
        for tensor in frames[1:]:
            self._num_bytes -= len(tensor)

    def _say_hello(self) -> None:
        session = self.session
        hello = Hello(
            schema=self._schema,
            name=self._name,
            receiver=self.peer,
            receiver_incarnation=self.peer_incarnation,
            session=session.secret,
            attempt=session.attempt + 1,
            first_sequence=session.next_sequence - len(self),
            max_queued=self._limits.max_queued,
            max_queued_bytes=self._limits.max_queued_bytes,
        )
        try:
            self._socket.send(seal(HELLO, self._incarnation, 0, encode_control(hello)), zmq.DONTWAIT)
        except zmq.Again:
            return
        session.attempt += 1
        self._is_hello_due = False


class LinkSession:
    """What outlives a link: who we are to the peer, and how far we counted.

    Attributes:
        secret: proves to the peer that a later hello comes from this process.
        attempt: number of the last hello.
        next_sequence: of the next message.
    """

    def __init__(self) -> None:
        self.secret = os.urandom(16)
        self.attempt = 0
        self.next_sequence = 1
