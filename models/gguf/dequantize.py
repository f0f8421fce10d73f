"""From ggml's blocks to codes and factors, and on to numbers: bit for bit what `dequantize_ref` says one by one.

Source: `dequantize_row_*` in ggml-quants.c and the block structures in ggml-common.h of ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from ...kernels.gguf_blocks import decode_blocks
from .tensor_types import TensorType

# Elements at a time: what they are made from stays in a core's cache, and no operation is so large that torch would
# share it among threads, which costs more than it gives where other work runs beside.
_CHUNK_ELEMENTS: Final = 2**15

PLAIN: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Quantised elements, in groups that share their factors: `scale * (code - zero) + offset`.

    Attributes:
        codes: `[num_blocks, num_groups, group_size]` uint8 or int8.
        scales: `[num_blocks, num_groups]` float16 or float32.
        offsets: the same, or None.
        zero: of all groups.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    zero: int = 0

    def values(self) -> torch.Tensor:
        """The elements, `[num_blocks, num_groups, group_size]` float32, each operation rounded."""
        values = self.codes.float()
        if self.zero:
            values.sub_(float(self.zero))
        values.mul_(self.scales.float().unsqueeze(-1))
        return values if self.offsets is None else values.add_(self.offsets.float().unsqueeze(-1))


def dequantize(raw: torch.Tensor, kind: TensorType, out: torch.Tensor) -> None:
    """Decode a quantised tensor's bytes.

    Args:
        raw: `[num_blocks, block_bytes]` uint8, contiguous.
        kind: type of the blocks, one of `QUANTIZED`.
        out: `[num_blocks * block_size]` of any float dtype, to which float32 results are rounded.
    """
    if decode_blocks(raw, kind.name, out):
        return
    blocks_at_once = max(1, _CHUNK_ELEMENTS // kind.block_size)
    decode = QUANTIZED[kind.name]
    for start in range(0, raw.shape[0], blocks_at_once):
        values = decode(raw[start : start + blocks_at_once]).values()
        first = start * kind.block_size
        out[first : first + values.numel()] = values.view(-1)


def _f16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, `[num_blocks, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _nibbles(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Low halves of the bytes, then high ones, along `dim`."""
    return torch.cat((packed & 0xF, packed >> 4), dim)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """The bits of `[num_blocks, n]` bytes, lowest first, `[num_blocks, 8 * n]`."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts) & 1).flatten(1)


def _q8_0(blocks: torch.Tensor) -> Blocks:
    """f16 d; i8 q[32]: d * q."""
    return Blocks(blocks[:, None, 2:].view(torch.int8), _f16(blocks, 0))


def _q4_0(blocks: torch.Tensor) -> Blocks:
    """f16 d; u4 q[32], the first 16 in the low halves: d * (q - 8)."""
    return Blocks(_nibbles(blocks[:, None, 2:], 2), _f16(blocks, 0), zero=8)


def _q4_1(blocks: torch.Tensor) -> Blocks:
    """f16 d, m; u4 q[32]: d * q + m."""
    return Blocks(_nibbles(blocks[:, None, 4:], 2), _f16(blocks, 0), _f16(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Blocks:
    """f16 d; u1 h[32]; u4 q[32]: d * (q + 16 h - 16)."""
    q = _nibbles(blocks[:, 6:], 1) | (_bits(blocks[:, 2:6]) << 4)
    return Blocks(q.unsqueeze(1), _f16(blocks, 0), zero=16)


def _q5_1(blocks: torch.Tensor) -> Blocks:
    """f16 d, m; u1 h[32]; u4 q[32]: d * (q + 16 h) + m."""
    q = _nibbles(blocks[:, 8:], 1) | (_bits(blocks[:, 4:8]) << 4)
    return Blocks(q.unsqueeze(1), _f16(blocks, 0), _f16(blocks, 2))


def _q2_k(blocks: torch.Tensor) -> Blocks:
    """u4 scale[16], min[16]; u2 q[256]; f16 d, dmin: groups of 16, d * scale * q - dmin * min."""
    scales, mins = blocks[:, :16] & 0xF, blocks[:, :16] >> 4
    q = _two_bits(blocks[:, 16:80]).view(-1, 16, 16)
    return Blocks(q, _times(blocks, 80, scales), -_times(blocks, 82, mins))


def _q3_k(blocks: torch.Tensor) -> Blocks:
    """u1 h[256]; u2 q[256]; u6 scale[16]; f16 d: groups of 16, d * (scale - 32) * (q + 4 h - 4)."""
    packed = blocks[:, 96:108]
    high = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = (_nibbles(packed[:, :8], 1) | (high << 4)).view(torch.int8) - 32
    q = (_two_bits(blocks[:, 32:96]).view(-1, 8, 32) | (_by_bit(blocks[:, :32]) << 2)).view(-1, 16, 16)
    return Blocks(q, _times(blocks, 108, scales), zero=4)


def _times(blocks: torch.Tensor, at: int, factors: torch.Tensor) -> torch.Tensor:
    """The float16 at byte `at` of each block times the factors of its groups, float32."""
    return _f16(blocks, at).float() * factors


def _two_bits(packed: torch.Tensor) -> torch.Tensor:
    """`[n, 64]` bytes to `[n, 256]`: 32 bytes hold 128 elements, the first 32 of which in their lowest bits."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((packed.reshape(-1, 2, 1, 32) >> shifts) & 3).flatten(1)


def _by_bit(packed: torch.Tensor) -> torch.Tensor:
    """`[n, 32]` bytes to `[n, 8, 32]`: bit j of byte i belongs to element 32 j + i."""
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1


def _scales_and_mins(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight six-bit scales and as many minima from 12 bytes: the last four have their high bits in the first eight."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 0xF) | ((first >> 6) << 4)), 1)
    mins = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return scales, mins


def _q4_k(blocks: torch.Tensor) -> Blocks:
    """f16 d, dmin; u6 scale[8], min[8]; u4 q[256]: groups of 32, d * scale * q - dmin * min."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    q = _nibbles(blocks[:, 16:].view(-1, 4, 1, 32), 2).view(-1, 8, 32)
    return Blocks(q, _times(blocks, 0, scales), -_times(blocks, 2, mins))


def _q5_k(blocks: torch.Tensor) -> Blocks:
    """f16 d, dmin; u6 scale[8], min[8]; u1 h[256]; u4 q[256]: groups of 32, d * scale * (q + 16 h) - dmin * min."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    q = _nibbles(blocks[:, 48:].view(-1, 4, 1, 32), 2).view(-1, 8, 32) | (_by_bit(blocks[:, 16:48]) << 4)
    return Blocks(q, _times(blocks, 0, scales), -_times(blocks, 2, mins))


def _q6_k(blocks: torch.Tensor) -> Blocks:
    """u4 low[256]; u2 high[256]; i8 scale[16]; f16 d: groups of 16, d * scale * (low + 16 high - 32)."""
    low = _nibbles(blocks[:, :128].view(-1, 2, 64), 2).reshape(-1, 256)
    q = (low | (_two_bits(blocks[:, 128:192]) << 4)).view(-1, 16, 16)
    return Blocks(q, _times(blocks, 208, blocks[:, 192:208].view(torch.int8)), zero=32)


QUANTIZED: Final[dict[str, Callable[[torch.Tensor], Blocks]]] = {
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

DECODED: Final = (*PLAIN, *QUANTIZED)
"""Types of tensors that can be read."""
