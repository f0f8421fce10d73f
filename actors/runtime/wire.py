"""Messages as bytes and back: a total codec, which denies by default.

A message is a msgpack map with its type's name as tag. Tensors travel beside it in frames of their own, without a copy.
Decoding ends for every input in a message of one of the expected types or in `MalformedMessageError`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Union

import msgspec

from ...messages.base import Message
from ...messages.tensor import Tensor
from .standing_columns import STANDING, StepDecoder
from .value_ranges import Check, compile_check

Buffer = bytes | memoryview


class MalformedMessageError(ValueError):
    """What arrived is no message that may arrive here."""


class Encoder:
    """Makes bytes of messages; tensors are handed out beside them."""

    def __init__(self) -> None:
        self._tensors: list[memoryview] = []
        self._encode = msgspec.msgpack.Encoder(enc_hook=self._encode_tensor).encode

    def encode(self, message: Message) -> tuple[bytes, Sequence[memoryview]]:
        """The message, and the memory of its tensors in the order in which they occur (not copied)."""
        body = self._encode(message)
        if not self._tensors:
            return body, ()
        tensors, self._tensors = self._tensors, []
        return body, tensors

    def _encode_tensor(self, value: object) -> tuple[str, tuple[int, ...], int, int]:
        if not isinstance(value, Tensor):
            raise NotImplementedError(f"a message cannot hold a {type(value).__name__}")
        self._tensors.append(value.data)
        return value.dtype, value.shape, len(self._tensors) - 1, zlib.crc32(value.data)


class _WireTensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """How a tensor stands in its message: what it is, which frame holds it, and the frame's CRC."""

    dtype: str
    shape: tuple[int, ...]
    frame: int
    crc: int


class Decoder:
    """Makes messages of bytes.

    Args:
        kinds: the types that may arrive; anything else is malformed. None at all: nothing may.
    """

    def __init__(self, kinds: Collection[type[Message]]) -> None:
        self._frames: Sequence[Buffer] = ()
        self._num_used = 0
        self._decode = None
        self._checks: dict[type[msgspec.Struct], Check] = {}
        self._steps: dict[type[msgspec.Struct], Callable[[Any], Message]] = {}
        wire_types: list[type[msgspec.Struct]] = []
        for kind in kinds:
            if kind in STANDING:
                step = StepDecoder(kind)
                wire_types.append(step.wire_type)
                self._steps[step.wire_type] = step.message
                continue
            wire_types.append(kind)
            check = compile_check(kind)
            if check is not None:
                self._checks[kind] = check
        if wire_types:
            union: Any = Union[tuple(wire_types)]  # noqa: UP007  # made at run time
            self._decode = msgspec.msgpack.Decoder(union, dec_hook=self._decode_tensor).decode

    def decode(self, body: Buffer, tensors: Sequence[Buffer] = ()) -> Message:
        """The message that `body` and the frames beside it stand for; the tensors read the frames' memory.

        Raises:
            MalformedMessageError: not msgpack, or of no expected type, or a field is missing, unknown, of another type
                or out of range, or frames and tensors do not match.
        """
        if self._decode is None:
            raise MalformedMessageError("nothing may arrive here")
        self._frames, self._num_used = tensors, 0
        try:
            value: Any = self._decode(body)
            step = self._steps.get(type(value))
            if step is not None:
                value = step(value)
            else:
                check = self._checks.get(type(value))
                if check is not None:
                    check(value)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, TypeError) as error:
            raise MalformedMessageError(str(error)) from error
        finally:
            self._frames = ()
        if self._num_used != len(tensors):
            raise MalformedMessageError(f"{len(tensors)} frames came with {self._num_used} tensors")
        message: Message = value
        return message

    def _decode_tensor(self, kind: type, value: object) -> Tensor:
        if kind is not Tensor:
            raise NotImplementedError(f"a message cannot hold a {kind.__name__}")
        wire = msgspec.convert(value, _WireTensor)
        if wire.frame != self._num_used or wire.frame >= len(self._frames):
            raise ValueError("a tensor names a frame that is not its own")
        frame = self._frames[wire.frame]
        if zlib.crc32(frame) != wire.crc:
            raise ValueError("a tensor's frame is damaged")
        self._num_used += 1
        return Tensor(wire.dtype, wire.shape, frame)  # type: ignore[arg-type]  # the constructor checks the name
