"""Weights in floats of 8 bits (e4m3), with scales, for GPUs that multiply them as they are.

Source: Micikevicius et al. 2022 (FP8 formats for deep learning) for e4m3; DeepSeek-AI 2024 (DeepSeek-V3), section 3.3,
for scales of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LARGEST = 448.0  # of e4m3
BLOCK = 128  # outputs, and inputs, of a block

_SMALLEST_SCALE = 2.0**-100  # in place of the 0 of weights that are all zeros


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """`[out_features, in_features]` weights and how the inputs that they multiply are rounded.

    Weight `i` of output `o` is `scales[o // rows_per_scale, i // group_size] * codes[o, i]`.

    Attributes:
        codes: float8_e4m3fn, `[out_features, in_features]`.
        scales: float32 `[ceil(out_features / rows_per_scale), ceil(in_features / group_size)]`.
        rows_per_scale: 1, or 128: then all inputs of a block of so many outputs, or of its group, share a scale.
        group_size: 128, or all inputs: of weights, and of a token's inputs, which are scaled in the same groups.
        input_scale: float32 `[1]`, of all inputs; None: each group of a token's has the scale that its largest needs.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    rows_per_scale: int
    group_size: int
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights it stands for: a product rounded once in float32, exact in float64."""
        out_features, in_features = self.shape
        scales = self.scales.to(dtype).repeat_interleave(self.rows_per_scale, dim=0)[:out_features]
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.group_size, dim=1)[:, :in_features]
        return self.codes.to(dtype) * scales

    def with_scale_per_row(self) -> Fp8Weight:
        """The same weights, each output with scales of its own."""
        rows = self.scales.repeat_interleave(self.rows_per_scale, dim=0)[: self.shape[0]]
        return Fp8Weight(self.codes, rows, 1, self.group_size, self.input_scale)


def quantize_fp8(weight: torch.Tensor, *, by_block: bool) -> Fp8Weight:
    """Floating weights as e4m3 codes: the largest of each block of 128 times 128, or of each output, becomes 448.

    Args:
        weight: `[out_features, in_features]`, any float dtype, on any device.
    """
    out_features, in_features = weight.shape
    rows, columns = (BLOCK, BLOCK) if by_block else (1, in_features)
    wide = F.pad(weight.float(), (0, -in_features % columns, 0, -out_features % rows))
    blocks = wide.view(wide.shape[0] // rows, rows, wide.shape[1] // columns, columns)
    scales = (blocks.abs().amax((1, 3)) / LARGEST).clamp_min(_SMALLEST_SCALE)
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(wide.shape)
    return Fp8Weight(codes[:out_features, :in_features].contiguous(), scales, rows, columns)


def joined_scales(parts: Sequence[Fp8Weight]) -> Fp8Weight | None:
    """Weights behind each other along their outputs, with the codes of the first; None where they cannot be one.

    That is where they differ in their groups, or in how their inputs are scaled, which is compared on the host.
    """
    first = parts[0]
    for part in parts[1:]:
        is_alike = part.group_size == first.group_size and part.shape[1] == first.shape[1]
        if not is_alike or not _is_same(part.input_scale, first.input_scale):
            return None
    rows = first.rows_per_scale
    if any(part.rows_per_scale != rows or part.shape[0] % rows for part in parts[:-1]) or (
        parts[-1].rows_per_scale != rows
    ):
        rows, parts = 1, [part.with_scale_per_row() for part in parts]
    scales = torch.cat([part.scales for part in parts])
    return Fp8Weight(first.codes, scales, rows, first.group_size, first.input_scale)


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
