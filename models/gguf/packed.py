"""Quantised matrices as the quantised linear layer takes them: no weight is rounded again."""

from __future__ import annotations

from typing import Final

import torch

from ...kernels.gguf_blocks import pack_blocks
from ...kernels.quantized_weight import QuantizedWeight
from .dequantize import QUANTIZED, Blocks
from .tensor_types import TensorType

# In groups of 32, as the layer wants them with 4 bits. Codes of fewer bits, or in smaller groups, take 8.
_FOUR_BITS: Final = ("Q4_0", "Q4_1", "Q4_K")
_PLAIN_ZERO: Final = {4: 8, 8: 0}  # what a weight without zero points or offsets takes off its codes

_CHUNK_ELEMENTS: Final = 2**15  # as in `dequantize`


def packed_weight(rows: torch.Tensor, kind: TensorType) -> QuantizedWeight:
    """A matrix's bytes as a `QuantizedWeight` of the same values.

    Args:
        rows: `[out_features, bytes of a row]` uint8, contiguous.
        kind: of the blocks, a quantised one.
    """
    return pack_blocks(rows, kind.name) or packed_weight_ref(rows, kind)


def packed_weight_ref(rows: torch.Tensor, kind: TensorType) -> QuantizedWeight:
    """What `packed_weight` means, in torch, and the way for types that the C library does not know."""
    out_features = rows.shape[0]
    bits = 4 if kind.name in _FOUR_BITS else 8
    in_features = rows.shape[1] // kind.block_bytes * kind.block_size
    codes = torch.empty((out_features, in_features), dtype=torch.uint8 if bits == 4 else torch.int8)
    scales, offsets = [], []
    rows_at_once = max(1, _CHUNK_ELEMENTS // in_features)
    group_size = kind.block_size
    for start in range(0, out_features, rows_at_once):
        part = rows[start : start + rows_at_once]
        blocks = QUANTIZED[kind.name](part.reshape(-1, kind.block_bytes))
        group_size = blocks.codes.shape[2]
        codes[start : start + rows_at_once] = _shifted(blocks, bits).reshape(-1, in_features)
        scales.append(blocks.scales.reshape(part.shape[0], -1))
        if blocks.offsets is not None:
            offsets.append(blocks.offsets.reshape(part.shape[0], -1))
    return QuantizedWeight.from_codes(
        codes,
        torch.cat(scales),
        bits=bits,
        group_size=group_size,
        offsets=torch.cat(offsets) if offsets else None,
    )


def _shifted(blocks: Blocks, bits: int) -> torch.Tensor:
    """Codes from which the layer's own zero, and no other, is to be taken off."""
    if blocks.offsets is not None:
        return blocks.codes
    by = blocks.zero - _PLAIN_ZERO[bits]
    return blocks.codes if by == 0 else blocks.codes.to(torch.int8) - by
