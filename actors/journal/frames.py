"""The journal's file: frames, each sealed with a SHA-256 that covers all frames before it.

    file    magic, frame, frame, ...
    frame   payload's length (u32), CRC-32 of that (u32), SHA-256 (32 bytes), payload; integers little endian

The first payload is the header, the others are arrays of records, all in msgpack. The length has a checksum of its own
so that a file that was cut short can be told from one in which a length was changed.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

MAGIC = b"octavoj\x01"

_LENGTH = struct.Struct("<I")
PREFIX_BYTES = 8 + 32


class FrameSealer:
    """Makes frames of payloads, or checks them."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(MAGIC).digest()

    @property
    def digest(self) -> bytes:
        """SHA-256 that covers everything so far."""
        return self._digest

    def seal(self, payload: bytes) -> bytes:
        """Return what stands before this payload in the file."""
        length = _LENGTH.pack(len(payload))
        self._digest = hashlib.sha256(self._digest + length + payload).digest()
        return length + _LENGTH.pack(zlib.crc32(length)) + self._digest

    @staticmethod
    def payload_length(prefix: bytes) -> int:
        """Return the length that a frame's prefix states, or -1 if it was changed."""
        length = prefix[:4]
        if zlib.crc32(length) != int.from_bytes(prefix[4:8], "little"):
            return -1
        return int.from_bytes(length, "little")
