"""`python -m octavo.actors.runtime.fuzz_wire --mutations 10000000 --live 1000000`: damaged traffic never decodes and
never crashes.

Frames of every type of message, with tensors and without, and of everything else that a link says, are flipped, cut,
extended and spliced. Nothing that differs from what was sent may be accepted: neither as a frame (the CRC) nor, behind
a CRC made to fit, as anything but a message in range or `MalformedMessageError`. The live part sends the same to a
port: what it hands on must be exactly what a decoder makes of it, and it must welcome its peer again each time.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq

from ...messages.base import Message
from .envelope import (
    DATA,
    GRANT,
    HEAD_BYTES,
    HELLO,
    NOT_CONTROL,
    REFUSE,
    RESET,
    WELCOME,
    Hello,
    NotAnEnvelopeError,
    Refuse,
    Welcome,
    decode_hello,
    encode_control,
    seal,
    unseal,
)
from .outgoing_link import LinkSession, OutgoingLink
from .port import Port
from .port_limits import PortLimits
from .sample_messages import KINDS, sample_messages
from .schema import schema_hash
from .wire import Decoder, Encoder, MalformedMessageError

_HELLO = Hello(schema_hash(), "edge 0", "engine", 1, bytes(16), 1, 1, 1000, 1 << 20)
_CONTROL: dict[int, Any] = {
    HELLO: _HELLO,
    WELCOME: Welcome("engine", 1, 1024),
    REFUSE: Refuse("stale", "edge 0 was replaced"),
    GRANT: None,
    RESET: None,
}
_PATIENCE = 10_000
_BURST = 32  # messages to a live port between two hellos


class Recorded(NamedTuple):
    """What crossed a link: a frame, and those of its tensors."""

    kind: int
    frame: bytes
    tensors: tuple[bytes, ...] = ()


class Tally(NamedTuple):
    """What became of mutations: refused as frames, as tensors, and as bodies behind a CRC that fits."""

    num_frames: int
    num_tensors: int
    num_bodies: int


def record(messages: Sequence[Message]) -> list[Recorded]:
    """What a link sends for these messages."""
    encoder = Encoder()
    recorded = []
    for sequence, message in enumerate(messages, 1):
        body, tensors = encoder.encode(message)
        recorded.append(Recorded(DATA, seal(DATA, 1, sequence, body, len(tensors)), tuple(map(bytes, tensors))))
    return recorded


def record_control() -> list[Recorded]:
    """What else is said on a link."""
    return [
        Recorded(kind, seal(kind, 1, 1, b"" if value is None else encode_control(value)))
        for kind, value in _CONTROL.items()
    ]


def mutate(frame: bytes, frames: Sequence[bytes], chance: random.Random) -> bytes:
    """A damaged copy."""
    damaged = bytearray(frame)
    kind = chance.randrange(5)
    if kind <= 1:
        for _ in range(chance.choice((1, 1, 2, 8))):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del damaged[chance.randrange(len(damaged)) :]
    elif kind == 3:
        damaged.insert(chance.randrange(len(damaged)), chance.randrange(256))
    else:
        other = chance.choice(frames)
        damaged[chance.randrange(len(damaged)) :] = other[chance.randrange(len(other)) :]
    return bytes(damaged)


def fuzz(recorded: Sequence[Recorded], num_mutations: int, seed: int) -> Tally:
    """Try mutations on what reads frames.

    Raises:
        AssertionError: a damaged frame was accepted. Any other exception than the refusals escapes: a crash.
    """
    chance = random.Random(seed)  # noqa: S311  # a test, not a secret
    decoder = Decoder(KINDS)
    frames = [each.frame for each in recorded]
    known = set(frames)
    num_frames = num_tensors = num_bodies = 0
    for _ in range(num_mutations):
        chosen = chance.choice(recorded)
        if any(chosen.tensors) and chance.random() < 0.5:
            num_tensors += _refuses_tensors(decoder, chosen, chance)
            continue
        damaged = mutate(chosen.frame, frames, chance)
        try:
            unseal(damaged)
        except NotAnEnvelopeError:
            num_frames += 1
        else:
            assert damaged in known, f"a damaged frame was accepted (seed {seed}): {damaged.hex()}"
        num_bodies += not _takes_body(decoder, chosen, damaged[HEAD_BYTES:])
    return Tally(num_frames, num_tensors, num_bodies)


def _refuses_tensors(decoder: Decoder, chosen: Recorded, chance: random.Random) -> bool:
    tensors = list(chosen.tensors)
    index = chance.choice([number for number, tensor in enumerate(tensors) if tensor])
    tensors[index] = mutate(tensors[index], [each for each in tensors if each], chance)
    try:
        decoder.decode(memoryview(chosen.frame)[HEAD_BYTES:], tensors)
    except MalformedMessageError:
        return True
    assert tuple(tensors) == chosen.tensors, "a damaged tensor was accepted"
    return False


def _takes_body(decoder: Decoder, chosen: Recorded, body: bytes) -> bool:
    """Whether a body is accepted, as if it had been sent like this."""
    if chosen.kind == DATA:
        try:
            decoder.decode(body, chosen.tensors)
        except MalformedMessageError:
            return False
        return True
    if chosen.kind == HELLO:
        try:
            decode_hello(body)
        except NOT_CONTROL:
            return False
        return True
    link = OutgoingLink(
        name="edge 0",
        incarnation=1,
        peer="engine",
        peer_incarnation=1,
        socket=_Unheard(),  # type: ignore[arg-type]  # has what is used of a socket
        schema="",
        limits=PortLimits(),
        session=LinkSession(),
    )
    link.send(b"")
    return link.on_frame(seal(chosen.kind, 1, 1, body)) != "malformed"


class _Unheard:
    """A socket that sends to nobody."""

    def send(self, *_: object, **__: object) -> None:
        """Nobody hears it."""


def fuzz_port(recorded: Sequence[Recorded], num_mutations: int, seed: int, folder: Path) -> int:
    """Try mutations on a port, which is to be in a folder of mode 0700; returns how many messages it handed on.

    Raises:
        AssertionError: it handed on anything else than a decoder makes of the bodies. Any other exception: a crash.
    """
    chance = random.Random(seed)  # noqa: S311  # a test, not a secret
    frames = [each.frame for each in recorded]
    limits = PortLimits(max_tensors=8, max_messages_per_s=10**9, max_bytes_per_s=1 << 40)
    port = Port("engine", 1, allowed={"edge": KINDS}, limits=limits)
    peer = _RawPeer(port, port.bind(f"ipc://{folder}/fuzzed"))
    decoder = Decoder(KINDS)
    on_link = [each for each in recorded if each.kind != HELLO]  # another hello may be somebody else's, rightly
    expected: list[Message] = []
    num_accepted = 0
    try:
        for _ in range(-(-num_mutations // (_BURST + 1))):
            sequence = peer.greet()
            assert peer.received == expected, f"a port took what was not said, or lost what was (seed {seed})"
            num_accepted += len(expected)
            expected.clear()
            peer.received.clear()
            for number in range(_BURST):
                chosen = chance.choice(on_link)
                body = mutate(chosen.frame, frames, chance)[HEAD_BYTES:]
                if chosen.kind != DATA:
                    peer.say(seal(chosen.kind, 1, sequence + number, body))
                    body, chosen = b"", Recorded(DATA, b"")
                peer.say(seal(DATA, 1, sequence + number, body, len(chosen.tensors)), *chosen.tensors)
                with contextlib.suppress(MalformedMessageError):
                    expected.append(decoder.decode(body, chosen.tensors))
            peer.say(mutate(chance.choice(frames), frames, chance))  # which breaks the link, unless it says nothing new
        peer.greet()
        assert peer.received == expected
    finally:
        peer.close()
        port.close()
    return num_accepted + len(expected)


class _RawPeer:
    """Says to a port what it is told to, and reads the port."""

    def __init__(self, port: Port, endpoint: str) -> None:
        self.received: list[Message] = []
        self._port = port
        self._attempt = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)

    def say(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def greet(self) -> int:
        """Say hello, and have the port read everything up to it; the sequence to go on with."""
        self._attempt += 1
        hello = msgspec.structs.replace(_HELLO, attempt=self._attempt)
        self.say(seal(HELLO, 1, 0, encode_control(hello)))
        for _ in range(_PATIENCE):
            self._port.wait(10)
            self.received += [message for _, message in self._port.receive()]
            self._port.events.clear()
            while self._socket.poll(0):
                frame = self._socket.recv()
                head = unseal(frame)
                if head.kind == WELCOME and msgspec.msgpack.decode(frame[HEAD_BYTES:])["attempt"] == self._attempt:
                    return head.sequence
        raise AssertionError("a port welcomes its peer no more")

    def close(self) -> None:
        self._context.destroy(linger=0)


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m octavo.actors.runtime.fuzz_wire", description=__doc__)
    parser.add_argument("--mutations", type=int, default=1_000_000, help="for what reads frames")
    parser.add_argument("--live", type=int, default=100_000, help="for a port")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recorded = [*record(sample_messages(arguments.seed)), *record_control()]
    tally = fuzz(recorded, arguments.mutations, arguments.seed)
    print(
        f"{arguments.mutations} mutations of {len(KINDS)} types (seed {arguments.seed}): {tally.num_frames} refused as "
        f"frames and {tally.num_tensors} as tensors, the others were what was sent; {tally.num_bodies} bodies refused "
        "behind a fitting CRC; no crash",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as name:
        num_accepted = fuzz_port(recorded, arguments.live, arguments.seed, Path(name))
    print(f"{arguments.live} mutations to a port: it handed on the {num_accepted} that were messages; no crash")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
