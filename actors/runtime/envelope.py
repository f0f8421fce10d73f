"""The one frame in which anything crosses a link: a fixed head, then a body.

    crc32 of the rest | magic "OCTV" | protocol version | kind | number of tensor frames | incarnation | sequence | body
    4                 | 4            | 2                | 1    | 1                       | 8           | 8        | ...

All little endian. The head is the same in every protocol version, so that a refusal can name both versions. The CRC
is there against damage, not against people: those are kept out by file modes and CURVE keys.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import msgspec

PROTOCOL_VERSION: Final = 1

HELLO: Final = 1  # sender -> receiver: who I am; body `Hello`
WELCOME: Final = 2  # receiver -> sender: go on from `sequence`; body `Welcome`
REFUSE: Final = 3  # receiver -> sender: no; body `Refuse`
DATA: Final = 4  # sender -> receiver: a message
GRANT: Final = 5  # receiver -> sender: all before `sequence` were taken; the window moves there
RESET: Final = 6  # receiver -> sender: I do not know this link, or something is missing; say hello again

_HEAD: Final = struct.Struct("<I4sHBBQQ")
_TAIL: Final = struct.Struct("<4sHBBQQ")
_MAGIC: Final = b"OCTV"

HEAD_BYTES: Final = _HEAD.size


class NotAnEnvelopeError(ValueError):
    """These bytes are no frame of this protocol, or they are damaged."""


class Head(msgspec.Struct, frozen=True, gc=False):
    """A frame's head.

    Attributes:
        incarnation: of the process that sent it.
        sequence: of a message, from 1 up on its link; what it means in other kinds stands there.
    """

    version: int
    kind: int
    num_tensors: int
    incarnation: int
    sequence: int


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A sender introduces itself.

    Attributes:
        schema: its messages' hash.
        name: its name.
        receiver, receiver_incarnation: whom it means to talk to.
        session: random; proves that a later hello comes from the same process.
        attempt: goes up with each hello of the session.
        first_sequence: the oldest message that it can still send.
        max_queued, max_queued_bytes: what it holds at most for the receiver, who grants often enough for that.
    """

    schema: str
    name: str
    receiver: str
    receiver_incarnation: int
    session: bytes
    attempt: int
    first_sequence: int
    max_queued: int
    max_queued_bytes: int


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A receiver accepts the hello number `attempt`; at most `window` messages may be under way."""

    name: str
    attempt: int
    window: int


class Refuse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A receiver's no: a code for programs, a sentence for people."""

    code: str
    why: str


def seal(kind: int, incarnation: int, sequence: int, body: bytes = b"", num_tensors: int = 0) -> bytes:
    """Make a frame."""
    tail = _TAIL.pack(_MAGIC, PROTOCOL_VERSION, kind, num_tensors, incarnation, sequence)
    return b"".join((zlib.crc32(body, zlib.crc32(tail)).to_bytes(4, "little"), tail, body))


def unseal(frame: bytes) -> Head:
    """Read and check a frame's head; the body begins at `HEAD_BYTES`.

    Raises:
        NotAnEnvelopeError: too short, of another kind, or damaged.
    """
    if len(frame) < HEAD_BYTES:
        raise NotAnEnvelopeError("a frame is shorter than its head")
    crc, magic, version, kind, num_tensors, incarnation, sequence = _HEAD.unpack_from(frame)
    if magic != _MAGIC:
        raise NotAnEnvelopeError("a frame of no protocol of ours")
    if zlib.crc32(memoryview(frame)[4:]) != crc:
        raise NotAnEnvelopeError("a frame is damaged")
    return Head(version, kind, num_tensors, incarnation, sequence)


encode_control = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_welcome = msgspec.msgpack.Decoder(Welcome).decode
decode_refuse = msgspec.msgpack.Decoder(Refuse).decode

NOT_CONTROL: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What these raise for bytes that are no such body."""
