"""How codes of 4 and 8 bits lie in memory: see csrc/quantized.c for why, and gpu/linear_quantized.py for a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PAD = 64  # inputs that rows of codes are filled up to a multiple of; as in csrc/quantized.h
NIBBLE_ROWS = 8  # weight rows whose codes of 4 bits lie among each other; likewise


def padded_inputs(in_features: int) -> int:
    """How many codes a row has."""
    return -(-in_features // PAD) * PAD


def codes_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int]:
    """Of codes on a CPU; in_features is a multiple of `PAD`."""
    if bits == 8:
        return out_features, in_features
    return -(-out_features // NIBBLE_ROWS), in_features * NIBBLE_ROWS // 2


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, `[out_features, in_features]` uint8, in_features a multiple of `PAD`, two to a byte.

    Returns:
        On a CPU `[ceil(out_features / 8), 4 * in_features]`: of 64 inputs and 8 rows, byte `32 v + 4 r + b` holds input
        `4 v + b` of row `r` and, above, `32 + 4 v + b`. Elsewhere `[out_features, in_features / 2]`: input
        `16 s + l` of 64 are bits `4 s` of 16-bit word `l`.
    """
    out_features, in_features = codes.shape
    if codes.device.type != "cpu":
        pairs = codes.view(out_features, in_features // PAD, 2, 2, 16)
        return (pairs[:, :, :, 0] | (pairs[:, :, :, 1] << 4)).transpose(-1, -2).reshape(out_features, -1).contiguous()
    rows = F.pad(codes, (0, 0, 0, -out_features % NIBBLE_ROWS))
    halves = rows.view(-1, NIBBLE_ROWS, in_features // PAD, 2, 8, 4)
    packed = (halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)).permute(0, 2, 3, 1, 4)
    return packed.reshape(len(packed), -1).contiguous()


def unpack_nibbles(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`, one code an element: `[out_features, in_features]`."""
    if packed.device.type != "cpu":
        words = packed.view(out_features, -1, 16, 2).transpose(-1, -2)
        return torch.stack((words & 15, words >> 4), dim=3).reshape(out_features, -1)
    words = packed.view(packed.shape[0], -1, 8, NIBBLE_ROWS, 4)
    nibbles = torch.stack((words & 15, words >> 4), dim=2)  # [blocks, units, halves, fours, rows, 4]
    return nibbles.permute(0, 4, 1, 2, 3, 5).reshape(packed.shape[0] * NIBBLE_ROWS, -1)[:out_features]
