"""A tensor as a message's field: plain memory, no framework."""

from __future__ import annotations

import math
from typing import Literal

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]

BYTES_OF: dict[DType, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class Tensor:
    """Contiguous values that travel beside a message, never copied into it.

    The memory must stay as it is while the message is under way; `numpy.frombuffer(tensor.data, ...)` reads it.

    Args:
        dtype: of the values, little endian.
        shape: outermost dimension first.
        data: the memory, `prod(shape) * BYTES_OF[dtype]` bytes.

    Raises:
        ValueError: unknown dtype, a negative dimension, or memory of another size.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: DType, shape: tuple[int, ...], data: memoryview | bytes) -> None:
        if dtype not in BYTES_OF:
            raise ValueError(f"a tensor's dtype is one of {', '.join(BYTES_OF)}, not {dtype!r}")
        if any(size < 0 for size in shape):
            raise ValueError(f"a dimension of {shape} is negative")
        view = memoryview(data)
        if view.nbytes != math.prod(shape) * BYTES_OF[dtype]:
            raise ValueError(f"{view.nbytes} bytes are no {dtype} tensor of shape {shape}")
        self.dtype = dtype
        self.shape = shape
        self.data = view.cast("B") if view.nbytes else memoryview(b"")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensor):
            return NotImplemented
        return (self.dtype, self.shape, self.data) == (other.dtype, other.shape, other.data)

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape))
