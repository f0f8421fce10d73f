"""Ports to try things on, and peers that say whatever a test wants."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence

import zmq

from octavo.actors.runtime import envelope
from octavo.actors.runtime.port import Port
from octavo.actors.runtime.port_limits import PortLimits
from octavo.actors.runtime.schema import schema_hash
from octavo.actors.runtime.wire import Encoder
from octavo.messages.base import Message
from octavo.messages.ids import RequestId
from octavo.messages.request import CancelRequest

PATIENCE_S = 180.0


def cancel(number: int) -> CancelRequest:
    return CancelRequest(RequestId(number))


class Pump:
    """Runs ports until something is so, keeping what they received."""

    def __init__(self, *ports: Port) -> None:
        self.ports = ports
        self.received: dict[str, list[tuple[str, Message]]] = {port.name: [] for port in ports}
        self.events: dict[str, list[tuple[str, str]]] = {port.name: [] for port in ports}

    def turn(self, wait_ms: int = 20) -> None:
        poll = select.poll()
        for port in self.ports:
            poll.register(port.fileno(), select.POLLIN)
        if not any(port.has_more for port in self.ports):
            poll.poll(wait_ms)
        for port in self.ports:
            self.received[port.name] += port.receive()
            while port.events:
                event = port.events.popleft()
                self.events[port.name].append((event.peer, event.what))

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, (
                [port.counters for port in self.ports],
                self.events,
                {name: len(held) for name, held in self.received.items()},
            )
            self.turn()

    def numbers(self, port: Port, peer: str | None = None) -> list[int]:
        """Ids of the cancels that a port received."""
        return [
            message.request_id
            for sender, message in self.received[port.name]
            if isinstance(message, CancelRequest) and peer in (None, sender)
        ]


class RawPeer:
    """A DEALER that speaks the protocol by hand, well or badly."""

    def __init__(self, endpoint: str, *, name: str = "edge 0", incarnation: int = 1, to: str = "engine") -> None:
        self.name = name
        self.incarnation = incarnation
        self.to = to
        self.session = name.encode() + bytes(16)
        self.attempt = 0
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = 0
        self.socket.connect(endpoint)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def hello(self, *, first_sequence: int = 1, **changed: object) -> None:
        self.attempt += 1
        fields: dict[str, object] = {
            "schema": schema_hash(),
            "name": self.name,
            "receiver": self.to,
            "receiver_incarnation": 1,
            "session": self.session,
            "attempt": self.attempt,
            "first_sequence": first_sequence,
            "max_queued": 1000,
            "max_queued_bytes": 1 << 20,
        }
        hello = envelope.Hello(**{**fields, **changed})  # type: ignore[arg-type]
        self.socket.send(envelope.seal(envelope.HELLO, self.incarnation, 0, envelope.encode_control(hello)))

    def say(self, sequence: int, message: Message | bytes, *, incarnation: int | None = None) -> None:
        self.socket.send(self.frame(sequence, message, incarnation=incarnation))

    def frame(self, sequence: int, message: Message | bytes, *, incarnation: int | None = None) -> bytes:
        body = message if isinstance(message, bytes) else Encoder().encode(message)[0]
        return envelope.seal(envelope.DATA, self.incarnation if incarnation is None else incarnation, sequence, body)

    def answers(self) -> list[tuple[int, int, bytes]]:
        """`(kind, sequence, body)` of what came back."""
        found = []
        while self.socket.poll(0):
            frame = self.socket.recv()
            head = envelope.unseal(frame)
            found.append((head.kind, head.sequence, frame[envelope.HEAD_BYTES :]))
        return found

    def await_answer(self, pump: Pump, kind: int) -> tuple[int, bytes]:
        """Pump until an answer of this kind came; its sequence and body."""
        seen: list[tuple[int, int, bytes]] = []

        def has_come() -> bool:
            seen.extend(self.answers())
            return any(answer[0] == kind for answer in seen)

        pump.until(has_come)
        return next((sequence, body) for found, sequence, body in seen if found == kind)

    def greet(self, pump: Pump, **changed: object) -> int:
        """Say hello and be welcomed; the sequence to go on with."""
        self.hello(**changed)  # type: ignore[arg-type]
        return self.await_answer(pump, envelope.WELCOME)[0]


def with_data(version: int, frame: bytes) -> bytes:
    """A frame as another protocol version would have sealed it."""
    import zlib

    tail = bytearray(frame[4:])
    tail[4:6] = version.to_bytes(2, "little")
    return zlib.crc32(tail).to_bytes(4, "little") + bytes(tail)


def open_port(
    name: str = "engine",
    incarnation: int = 1,
    *,
    hears: Sequence[type[Message]] = (CancelRequest,),
    peers: Sequence[str] = ("edge",),
    limits: PortLimits | None = None,
    schema: str = "",
    self_announced: tuple[str, ...] = (),
) -> Port:
    return Port(
        name,
        incarnation,
        allowed=dict.fromkeys(peers, hears),
        limits=limits,
        schema=schema,
        self_announced=self_announced,
    )
