"""ggml's quantised blocks, decoded by the C kernels: a checkpoint of 600 M weights in a fraction of a second.

What the blocks mean is said in `models.gguf.dequantize`, whose results these are bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cpu_build, huge_pages
from .code_layout import NIBBLE_ROWS, codes_shape, padded_inputs
from .cpu_build import CODE, POINTER, SIZE
from .quantized_weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A type of blocks: its number in `enum ggml_type`, and what `QuantizedWeight` makes of it."""

    number: int
    block_size: int
    block_bytes: int
    bits: int
    group_size: int
    has_offsets: bool
    factor_dtype: torch.dtype  # int8: whole numbers, times float16 factors of a block


LAYOUTS = {
    "Q4_0": BlockLayout(2, 32, 18, 4, 32, False, torch.float16),
    "Q4_1": BlockLayout(3, 32, 20, 4, 32, True, torch.float16),
    "Q5_0": BlockLayout(6, 32, 22, 8, 32, False, torch.float16),
    "Q5_1": BlockLayout(7, 32, 24, 8, 32, True, torch.float16),
    "Q8_0": BlockLayout(8, 32, 34, 8, 32, False, torch.float16),
    "Q4_K": BlockLayout(12, 256, 144, 4, 32, True, torch.int8),
    "Q5_K": BlockLayout(13, 256, 176, 8, 32, True, torch.int8),
    "Q6_K": BlockLayout(14, 256, 210, 8, 16, False, torch.int8),
}


def pack_blocks(rows: torch.Tensor, name: str) -> QuantizedWeight | None:
    """A matrix of blocks as a `QuantizedWeight` of the same values; None where the C library cannot do it.

    Args:
        rows: `[out_features, bytes of a row]` uint8, contiguous.
        name: type of the blocks.
    """
    layout, kernels = LAYOUTS.get(name), _kernels()
    if layout is None or kernels is None or not rows.is_contiguous() or rows.numel() == 0:
        return None
    out_features, num_blocks = rows.shape[0], rows.shape[1] // layout.block_bytes
    in_features = num_blocks * layout.block_size
    padded = padded_inputs(in_features)
    codes = huge_pages.empty(codes_shape(out_features, padded, layout.bits), torch.uint8).zero_()
    factors: tuple[int, ...] = (out_features, in_features // layout.group_size)
    if layout.factor_dtype == torch.int8 and layout.bits == 4:
        factors = (-(-out_features // NIBBLE_ROWS), factors[1], NIBBLE_ROWS)
    scales = torch.zeros(factors, dtype=layout.factor_dtype)
    offsets = torch.zeros_like(scales) if layout.has_offsets else None
    superblocks = None
    if layout.factor_dtype == torch.int8:
        superblocks = torch.empty((out_features, num_blocks, 1 + layout.has_offsets), dtype=torch.float16)
    kernels.octavo_gguf_pack(
        *(layout.number, rows.data_ptr(), out_features, num_blocks, codes.data_ptr(), padded, scales.data_ptr()),
        *(None if tensor is None else tensor.data_ptr() for tensor in (offsets, superblocks)),
        torch.get_num_threads(),
    )
    return QuantizedWeight(
        codes, scales, None, offsets, layout.bits, layout.group_size, in_features, superblock_scales=superblocks
    )


def decode_blocks(blocks: torch.Tensor, name: str, out: torch.Tensor) -> bool:
    """Blocks as numbers, `[num_blocks * block_size]` in the dtype of `out`; False where the C library cannot do it.

    Args:
        blocks: `[num_blocks, bytes of a block]` uint8, contiguous.
    """
    layout, kernels = LAYOUTS.get(name), _kernels()
    if layout is None or kernels is None or out.dtype not in cpu_build.DTYPE_CODES:
        return False
    if not (blocks.is_contiguous() and out.is_contiguous()):
        return False
    kernels.octavo_gguf_decode(
        *(layout.number, blocks.data_ptr(), blocks.shape[0], out.data_ptr()),
        *(cpu_build.DTYPE_CODES[out.dtype], torch.get_num_threads()),
    )
    return True


_kernels = cpu_build.declared(
    octavo_gguf_pack=(None, CODE, POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER, CODE),
    octavo_gguf_decode=(None, CODE, POINTER, SIZE, POINTER, CODE, CODE),
)
