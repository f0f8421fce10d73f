"""What ggml's blocks mean: one element after the other, each operation rounded to float32. Slow; an oracle for tests.

Source: the block structures in ggml-common.h and `dequantize_row_*` in ggml-quants.c of ggml-org/ggml. "Group" is a
run of elements that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

Values = Iterator[np.float32]


def dequantize_ref(raw: bytes, kind: str, block_bytes: int) -> npt.NDArray[np.float32]:
    """Decode whole blocks of a type."""
    decode = MEANING[kind]
    with np.errstate(all="ignore"):  # infinite scales are not for the decoder to judge
        values = [value for at in range(0, len(raw), block_bytes) for value in decode(raw[at : at + block_bytes])]
    return np.array(values, np.float32)


def _f16(block: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(block, "<f2", 1, at)[0])


def _int8(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _nibble(packed: bytes, index: int) -> int:
    """Of 32 elements in 16 bytes: the first 16 are the low halves, the others the high ones."""
    return packed[index] & 0xF if index < 16 else packed[index - 16] >> 4


def _f32(block: bytes) -> Values:
    yield np.float32(np.frombuffer(block, "<f4")[0])


def _plain_f16(block: bytes) -> Values:
    yield _f16(block, 0)


def _bf16(block: bytes) -> Values:
    yield np.float32(np.frombuffer(b"\0\0" + block, "<f4")[0])


def _q4_0(block: bytes) -> Values:
    for i in range(32):
        yield _f16(block, 0) * np.float32(_nibble(block[2:], i) - 8)


def _q4_1(block: bytes) -> Values:
    for i in range(32):
        yield _f16(block, 0) * np.float32(_nibble(block[4:], i)) + _f16(block, 2)


def _q5_0(block: bytes) -> Values:
    high = int.from_bytes(block[2:6], "little")
    for i in range(32):
        yield _f16(block, 0) * np.float32((_nibble(block[6:], i) | (high >> i & 1) << 4) - 16)


def _q5_1(block: bytes) -> Values:
    high = int.from_bytes(block[4:8], "little")
    for i in range(32):
        yield _f16(block, 0) * np.float32(_nibble(block[8:], i) | (high >> i & 1) << 4) + _f16(block, 2)


def _q8_0(block: bytes) -> Values:
    for i in range(32):
        yield _f16(block, 0) * np.float32(_int8(block[2 + i]))


def _two_bits(packed: bytes, index: int) -> int:
    """Of 256 elements in 64 bytes: 32 bytes hold 128, the first 32 of which in their lowest two bits."""
    half, rest = divmod(index, 128)
    return packed[32 * half + rest % 32] >> (2 * (rest // 32)) & 3


def _q2_k(block: bytes) -> Values:
    d, dmin = _f16(block, 80), _f16(block, 82)
    for i in range(256):
        scales = block[i // 16]
        scale, low = d * np.float32(scales & 0xF), dmin * np.float32(scales >> 4)
        yield scale * np.float32(_two_bits(block[16:80], i)) - low


def _q3_k(block: bytes) -> Values:
    packed = block[96:108]
    for i in range(256):
        group = i // 16
        low = packed[group] & 0xF if group < 8 else packed[group - 8] >> 4
        high = packed[8 + group % 4] >> (2 * (group // 4)) & 3
        scale = _f16(block, 108) * np.float32((low | high << 4) - 32)
        h = block[i % 32] >> (i // 32) & 1
        yield scale * np.float32(_two_bits(block[32:96], i) - (0 if h else 4))


def _scale_and_min(packed: bytes, group: int) -> tuple[int, int]:
    """`get_scale_min_k4`: six bits each; the last four groups have their high bits in the first eight bytes."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    scale = packed[group + 4] & 0xF | (packed[group - 4] >> 6) << 4
    return scale, packed[group + 4] >> 4 | (packed[group] >> 6) << 4


def _four_bits(packed: bytes, index: int) -> int:
    """Of 256 elements in 128 bytes: 32 bytes hold 64, the first 32 of which in their low halves."""
    pair, rest = divmod(index, 64)
    return packed[32 * pair + rest % 32] >> (4 * (rest // 32)) & 0xF


def _q4_k(block: bytes) -> Values:
    d, dmin = _f16(block, 0), _f16(block, 2)
    for i in range(256):
        scale, low = _scale_and_min(block[4:16], i // 32)
        q = _four_bits(block[16:], i)
        yield d * np.float32(scale) * np.float32(q) - dmin * np.float32(low)


def _q5_k(block: bytes) -> Values:
    d, dmin = _f16(block, 0), _f16(block, 2)
    for i in range(256):
        scale, low = _scale_and_min(block[4:16], i // 32)
        h = block[16 + i % 32] >> (i // 32) & 1
        q = _four_bits(block[48:], i) | h << 4
        yield d * np.float32(scale) * np.float32(q) - dmin * np.float32(low)


def _q6_k(block: bytes) -> Values:
    for i in range(256):
        half, rest = divmod(i, 128)
        low = block[64 * half + rest % 64] >> (4 * (rest // 64)) & 0xF
        high = _two_bits(block[128:192], i)
        scale = _f16(block, 208) * np.float32(_int8(block[192 + i // 16]))
        yield scale * np.float32((low | high << 4) - 32)


MEANING: Final[dict[str, Callable[[bytes], Values]]] = {
    "F32": _f32,
    "F16": _plain_f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
