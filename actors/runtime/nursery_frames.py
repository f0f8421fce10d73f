"""What a nursery and its parent say to each other, and how it stands on their socket.

A frame is its length (4 bytes, big endian) and a msgpack map with a type tag. A `Spawned` that announces a pidfd
carries it as ancillary data (SCM_RIGHTS) of its first byte.
"""

from __future__ import annotations

import msgspec

MAX_FRAME_BYTES = 64 << 20
"""A longer frame is a defect: arguments are configuration, never weights."""

_LENGTH_BYTES = 4


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Parent -> nursery, once: import these modules. Answered by `Prepared` or `Failed`."""

    modules: tuple[str, ...]


class Spawn(msgspec.Struct, frozen=True, tag=True):
    """Parent -> nursery: fork a child. Answered by `Spawned` or `SpawnRefused`.

    Attributes:
        call_id: names the answer.
        title: what the process is called, without the prefix.
        target: `module:function`; it is called with `arguments` and returns an exit code or None.
        arguments: for `target`, in a form of its own.
        env: the child's whole environment.
    """

    call_id: int
    title: str
    target: str
    arguments: bytes
    env: dict[str, str]


class Signal(msgspec.Struct, frozen=True, tag=True):
    """Parent -> nursery: signal a child, unless it has been reaped. For parents without pidfds."""

    pid: int
    signum: int


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """Nursery -> parent: everything is imported.

    Attributes:
        num_threads: of the nursery; more than 1 makes a fork unsafe.
    """

    num_threads: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Nursery -> parent: an import failed; the nursery ends."""

    why: str


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """Nursery -> parent: the child runs; its pidfd comes with this frame if `has_pidfd`."""

    call_id: int
    pid: int
    has_pidfd: bool


class SpawnRefused(msgspec.Struct, frozen=True, tag=True):
    """Nursery -> parent: there is no child."""

    call_id: int
    why: str


class Reaped(msgspec.Struct, frozen=True, tag=True):
    """Nursery -> parent: a child has ended.

    Attributes:
        status: its exit code, or minus the number of the signal that killed it.
    """

    pid: int
    status: int


Request = Prepare | Spawn | Signal
Report = Prepared | Failed | Spawned | SpawnRefused | Reaped

_encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


class FrameTooLongError(ValueError):
    """A frame is longer than `MAX_FRAME_BYTES`."""


def to_frame(message: Request | Report) -> bytes:
    """A message as it stands on the socket.

    Raises:
        FrameTooLongError: nothing of that size belongs here.
    """
    body = _encode(message)
    if len(body) > MAX_FRAME_BYTES:
        kind = type(message).__name__
        raise FrameTooLongError(f"{kind} has {len(body)} bytes, at most {MAX_FRAME_BYTES} are possible")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Bodies of the frames that `data` completes.

        Raises:
            FrameTooLongError: the peer is not one of ours.
        """
        self._buffer += data
        bodies = []
        while len(self._buffer) >= _LENGTH_BYTES:
            num_bytes = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if num_bytes > MAX_FRAME_BYTES:
                raise FrameTooLongError(f"a frame of {num_bytes} bytes, at most {MAX_FRAME_BYTES} are possible")
            end = _LENGTH_BYTES + num_bytes
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[_LENGTH_BYTES:end]))
            del self._buffer[:end]
        return bodies
