"""The container: header and metadata, read through a memory map, and where each tensor lies.

Every count, length and offset in a file is checked against the file and against a limit before anything is allocated or
looked at, so that a broken or a hostile file ends in an error that says where.

Source: docs/gguf.md of ggml-org/ggml, versions 2 and 3 of the format, little-endian.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
import numpy.typing as npt

from ..errors import ModelLoadError, UnsupportedModelError, WeightsError
from .tensor_types import TENSOR_TYPES, TensorType

MetadataArray = npt.NDArray[np.generic] | list[str]
MetadataValue = int | float | bool | str | MetadataArray

SUFFIX: Final = ".gguf"
MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)

# The header of a model with a vocabulary of 262,144 takes 15 MB.
MAX_HEADER_BYTES: Final = 256 * 2**20
MAX_NUM_KEYS: Final = 2**16
MAX_NUM_TENSORS: Final = 2**17
MAX_NUM_STRINGS: Final = 2**22  # in all arrays of a file together: each takes 50 bytes and more once decoded
MAX_KEY_BYTES: Final = 2**16 - 1
MAX_NAME_BYTES: Final = 64  # of a tensor, by the specification
MAX_DIMS: Final = 4  # by the specification
MAX_ELEMENTS: Final = 2**48
MAX_ALIGNMENT: Final = 2**20
_DEFAULT_ALIGNMENT: Final = 32

_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
# Metadata value types by number: little-endian numpy dtypes.
_SCALARS: Final[dict[int, np.dtype[np.generic]]] = {
    number: np.dtype(code)
    for number, code in enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))
    if number != _BOOL
} | {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
_FLOATS: Final = (6, 12)
_FLOAT32: Final = 6

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


def is_gguf(path: Path) -> bool:
    """Whether a checkpoint's path is a GGUF file and not a folder."""
    return path.suffix.lower() == SUFFIX and path.is_file()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: outermost dimension first, as torch has it; the file has the reverse.
        offset: of the first byte, in the file.
        num_bytes: that it takes.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GGUFFile:
    """An open file. Use as a context manager, or `close` it.

    Attributes:
        path: of the file.
        version: of the format.
        metadata: by key. Numbers are Python's, a float32 as the shortest decimal that stands for it; arrays of
            numbers are numpy's, arrays of strings lists.
        tensors: by name, in the order of the file.

    Raises:
        WeightsError: it is not a whole GGUF file.
        UnsupportedModelError: of a version, byte order or with a tensor type that is not known, or a part of a model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read as a GGUF file: {error}") from error
        try:
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._num_bytes = len(data)
                self._read_header(data)
        except ValueError as error:
            self._file.close()
            if isinstance(error, ModelLoadError):
                raise
            raise WeightsError(f"{path} cannot be read as a GGUF file: {error}") from error  # it is empty
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def read_tensor(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, in memory of its own.

        Read and not mapped: pages of the map would count as memory beside the weights that are made of them, and a file
        that is cut short meanwhile would kill the process.

        Raises:
            WeightsError: the file cannot be read, or is shorter than it was.
        """
        out = np.empty(info.num_bytes, np.uint8)
        view, position = out.data, 0
        while position < info.num_bytes:
            try:
                count = os.preadv(self._file.fileno(), [view[position:]], info.offset + position)
            except OSError as error:
                raise WeightsError(f"{self.path} cannot be read: {error}") from error
            if count == 0:
                raise WeightsError(f"{self.path} has become shorter while it was read")
            position += count
        return out

    def _read_header(self, data: mmap.mmap) -> None:
        cursor = _Cursor(self.path, data)
        if data[:4] != MAGIC:
            raise WeightsError(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        cursor.position = 4
        self.version = cursor.u32()
        if self.version not in VERSIONS:
            order = " It is big-endian: convert it again." if self.version & 0xFFFF == 0 else ""
            raise UnsupportedModelError(
                f"{self.path} is of GGUF version {self.version}; read are {' and '.join(map(str, VERSIONS))}.{order}"
            )
        num_tensors = cursor.count("tensors", MAX_NUM_TENSORS)
        num_keys = cursor.count("metadata entries", MAX_NUM_KEYS)
        self.metadata: dict[str, MetadataValue] = {}
        for _ in range(num_keys):
            key = cursor.string(MAX_KEY_BYTES)
            if key in self.metadata:
                raise cursor.broken(f"the metadata has {_shown(key)} twice")
            self.metadata[key] = cursor.value(key)
        if (num_parts := self.metadata.get("split.count", 0)) not in (0, 1):
            raise UnsupportedModelError(
                f"{self.path} is one of {num_parts} parts of a model: merge them into one file "
                "(llama-gguf-split --merge FIRST_PART OUT.gguf)"
            )
        declared = [self._read_tensor_info(cursor) for _ in range(num_tensors)]
        self.tensors = self._placed(cursor, declared)

    def _read_tensor_info(self, cursor: _Cursor) -> TensorInfo:
        """A tensor's entry; its offset is still counted from the beginning of the data."""
        name = cursor.string(MAX_NAME_BYTES)
        num_dims = cursor.u32()
        if not 1 <= num_dims <= MAX_DIMS:
            raise cursor.broken(f"tensor {_shown(name)} has {num_dims} dimensions instead of 1 to {MAX_DIMS}")
        shape = tuple(cursor.u64() for _ in range(num_dims))[::-1]
        number = cursor.u32()
        tensor_type = TENSOR_TYPES.get(number)
        if tensor_type is None:
            raise UnsupportedModelError(f"{self.path}: tensor {_shown(name)} is of type {number}, which is not known")
        offset = cursor.u64()
        num_elements = 1
        for size in shape:
            num_elements *= size
        if not 0 < num_elements <= MAX_ELEMENTS:
            raise cursor.broken(f"tensor {_shown(name)} has the shape {list(shape)}")
        if shape[-1] % tensor_type.block_size:
            raise cursor.broken(
                f"a row of {shape[-1]} in tensor {_shown(name)} is no whole number of {tensor_type.name} blocks"
            )
        return TensorInfo(
            name, tensor_type, shape, offset, num_elements // tensor_type.block_size * tensor_type.block_bytes
        )

    def _placed(self, cursor: _Cursor, declared: list[TensorInfo]) -> dict[str, TensorInfo]:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise cursor.broken(f"general.alignment is {_shown(alignment)}, but must be a power of two")
        start = -(-cursor.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for info in declared:
            if info.name in tensors:
                raise cursor.broken(f"there are two tensors {_shown(info.name)}")
            if info.offset % alignment:
                raise cursor.broken(f"tensor {_shown(info.name)} is not aligned to {alignment} bytes")
            offset = start + info.offset
            if offset + info.num_bytes > self._num_bytes:
                raise cursor.broken(
                    f"tensor {_shown(info.name)} ends at byte {offset + info.num_bytes:,} of {self._num_bytes:,}"
                )
            tensors[info.name] = TensorInfo(info.name, info.type, info.shape, offset, info.num_bytes)
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise cursor.broken(f"the tensors {_shown(before)} and {_shown(info.name)} overlap")
            end, before = info.offset + info.num_bytes, info.name
        return tensors


class _Cursor:
    """A place in the header. Whatever it reads, it has checked to be there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.position = 0
        self._path = path
        self._data = data
        self._end = min(len(data), MAX_HEADER_BYTES)
        self._num_strings = 0

    def broken(self, what: str) -> WeightsError:
        return WeightsError(f"{self._path} is not a whole GGUF file: {what}. Download it again.")

    def skip(self, num_bytes: int) -> int:
        """Step over bytes that must be there; returns where they begin."""
        start = self.position
        if num_bytes > self._end - start:
            limit = f"the {len(self._data):,} of the file" if self._end == len(self._data) else f"{self._end:,}"
            raise self.broken(f"{num_bytes:,} bytes from byte {start:,} on pass {limit}")
        self.position = start + num_bytes
        return start

    def u32(self) -> int:
        value: int = _U32.unpack_from(self._data, self.skip(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self._data, self.skip(8))[0]
        return value

    def count(self, what: str, limit: int) -> int:
        number = self.u64()
        if number > limit:
            raise self.broken(f"it counts {number:,} {what}; at most {limit:,} are read")
        return number

    def string(self, limit: int) -> str:
        length = self.u64()
        if length > limit:
            raise self.broken(f"a name at byte {self.position - 8:,} has {length:,} bytes; at most {limit:,} are read")
        return self._text(self.skip(length))

    def value(self, key: str) -> MetadataValue:
        number = self.u32()
        if number == _STRING:
            return self.string(MAX_HEADER_BYTES)
        if number == _ARRAY:
            return self._array(key)
        if number == _BOOL:
            return bool(self._flags(key, 1)[0])
        dtype = self._scalar(key, number)
        value = np.frombuffer(self._data, dtype, 1, self.skip(dtype.itemsize))[0]
        # A float32 of 1e-6 shall be 1e-6, as config.json has it, and not 9.999999974752427e-07.
        plain: int | float = float(str(value)) if number == _FLOAT32 else value.item()
        return plain

    def _array(self, key: str) -> MetadataArray:
        number = self.u32()
        if number == _STRING:
            return self._strings(key)
        length = self.u64()
        if number == _BOOL:
            return self._flags(key, length).astype(np.bool_)
        dtype = self._scalar(key, number)
        start = self.skip(length * dtype.itemsize)
        return np.frombuffer(self._data, dtype, length, start).copy()

    def _scalar(self, key: str, number: int) -> np.dtype[np.generic]:
        dtype = _SCALARS.get(number)
        if dtype is None:
            what = "an array of arrays" if number == _ARRAY else f"of type {number}"
            raise self.broken(f"metadata {_shown(key)} is {what}, which is not read")
        return dtype

    def _flags(self, key: str, length: int) -> npt.NDArray[np.uint8]:
        flags = np.frombuffer(self._data, np.uint8, length, self.skip(length)).copy()
        if length and flags.max() > 1:
            raise self.broken(f"metadata {_shown(key)} has a truth value of {flags.max()}")
        return flags

    def _strings(self, key: str) -> list[str]:
        length = self.u64()
        self._num_strings += length
        if self._num_strings > MAX_NUM_STRINGS:
            raise self.broken(f"metadata {_shown(key)} has {length:,} strings; at most {MAX_NUM_STRINGS:,} are read")
        texts = []
        # In one loop and without calls: a vocabulary is hundreds of thousands of them.
        data, end, position, unpack = self._data, self._end, self.position, _U64.unpack_from
        try:
            for _ in range(length):
                if position + 8 > end:
                    raise self.broken(f"metadata {_shown(key)} ends within the strings")
                stop = position + 8 + unpack(data, position)[0]
                if stop > end:
                    raise self.broken(f"a string of metadata {_shown(key)} at byte {position:,} is too long")
                texts.append(str(data[position + 8 : stop], "utf-8"))
                position = stop
        except UnicodeDecodeError as error:
            raise self.broken(f"a string of metadata {_shown(key)} at byte {position:,} is not UTF-8") from error
        self.position = position
        return texts

    def _text(self, start: int) -> str:
        try:
            return str(self._data[start : self.position], "utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"the string at byte {start:,} is not UTF-8") from error


def _shown(value: object) -> str:
    """A value of a file that nobody vouches for, for a message: quoted, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
