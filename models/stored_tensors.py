"""Where in a safetensors file each tensor's bytes lie, so that several threads can read them without the mapping."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class FileRange:
    """`num_bytes` bytes of an open file, from `offset` on."""

    fd: int
    offset: int
    num_bytes: int


def byte_ranges(path: Path, fd: int) -> dict[str, FileRange]:
    """The range of each tensor of a safetensors file, which has been checked to be one.

    Args:
        fd: the open file, that the ranges are of.

    Source: the format's README: 8 bytes of length, a JSON header, then the data, to which offsets are relative.
    """
    with path.open("rb") as file:
        (header_bytes,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json.loads(file.read(header_bytes))
    start = _LENGTH.size + header_bytes
    ranges = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            ranges[name] = FileRange(fd, start + begin, end - begin)
    return ranges
