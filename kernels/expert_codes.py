"""The matrices of a mixture's experts as codes of 4 or 8 bits, as a GPU's products over grouped tokens take them.

Each matrix is cut into units of 128 inputs with 4 bits, of 32 with 8. A unit is one row of 32 elements for each output,
and the units of all outputs lie behind each other: what a program reads at a time is one piece of memory. Bits `4 s` of
word `l` of a unit are input `32 s + l`, so that a quarter of every word makes a tile of 32 consecutive inputs, which
have one scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .quantized_weight import LinearWeight, QuantizedWeight

WIDTH = 32  # elements of a unit's row, and inputs of a tile; as in gpu/mixture_codes.py
PARTS = {4: 4, 8: 1}  # tiles of a unit, by the bits of a code

MOST_EXPONENT = 128
"""The largest exponent of MXFP4 that is kept, a factor of 2: all that a bfloat16 multiplied by 2 ** 126 more holds."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_DOUBLE_BIAS, _DOUBLE_MANTISSA, _EXPONENT_BIAS = 1023, 52, 127


@dataclass(frozen=True, slots=True)
class ExpertCodes:
    """One projection of all experts, `[num_experts, out_features, in_features]`, as codes with a scale for each group.

    Make one with `from_mxfp4` or `coded`; `dequantize` is the meaning as code.

    Attributes:
        codes: `[num_experts, num_units, out_features, 32]`: int16 words of four codes, or int8 codes; 0 behind the
            last input.
        scales: `[num_experts, num_groups, out_features]`, any float dtype. Of MXFP4 int32 `[num_experts, num_units,
            out_features]`: byte `s` is the exponent of inputs `32 s` to `32 s + 31` of the unit.
        zeros: int16, the shape of scales; None means 8 for codes of 4 bits and 0 for codes of 8.
        bits: 4 or 8.
        group_size: consecutive inputs that share a scale, a multiple of 32; the last group may be smaller.
        is_mxfp4: codes are 4-bit floats (E2M1), and scales powers of two (E8M0), exponents at most `MOST_EXPONENT`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int
    in_features: int
    is_mxfp4: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(num_experts, out_features, in_features)`, as of a tensor."""
        return self.codes.shape[0], self.codes.shape[2], self.in_features

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.zeros) if tensor is not None)

    @classmethod
    def from_mxfp4(
        cls, parts: Iterable[tuple[torch.Tensor, torch.Tensor]], *, num_experts: int, in_features: int
    ) -> ExpertCodes:
        """Lay out what a checkpoint in MXFP4 holds of each expert, one after the other.

        Args:
            parts: of each expert uint8 blocks `[out_features, num_groups, 16]`, two codes a byte, the first in the
                lower half, and exponents `[out_features, num_groups]`, at most `MOST_EXPONENT`.
        """
        codes, scales = _filled((_mxfp4_units(*part) for part in parts), num_experts)
        return cls(codes, scales, None, bits=4, group_size=WIDTH, in_features=in_features, is_mxfp4=True)

    def dequantize(self, expert: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One expert's weights, `[out_features, in_features]`."""
        codes = _codes_of(self.codes[expert], self.bits)[:, : self.in_features]
        if self.is_mxfp4:
            values = torch.tensor(_E2M1, dtype=dtype, device=codes.device)[codes.long()]
            words = self.scales[expert].T
            exponents = torch.stack([(words >> (8 * part)) & 255 for part in range(PARTS[4])], dim=-1).flatten(1)
            bits = (exponents.long() - _EXPONENT_BIAS + _DOUBLE_BIAS) << _DOUBLE_MANTISSA
            powers = bits.view(torch.float64).to(dtype).repeat_interleave(WIDTH, dim=1)
            return values * powers[:, : self.in_features]
        group = torch.arange(self.in_features, device=codes.device) // self.group_size
        zeros: torch.Tensor | int = 8 if self.bits == 4 else 0
        if self.zeros is not None:
            zeros = self.zeros[expert].T.to(dtype)[:, group]
        return self.scales[expert].T.to(dtype)[:, group] * (codes.to(dtype) - zeros)


def coded(weights: Sequence[LinearWeight]) -> ExpertCodes | None:
    """One projection of several experts, with the codes and factors that it has; None where they cannot lie so.

    That is where some are floating or of different kinds, have offsets or inputs sorted by importance, or groups that
    are no multiple of 32.
    """
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(quantized) < len(weights) or any(_kind(weight) != _kind(quantized[0]) for weight in quantized):
        return None
    first = quantized[0]
    is_one_group = first.scales.shape[1] == 1
    has_other_factors = first.offsets is not None or first.superblock_scales is not None
    has_order = any(weight.input_order is not None for weight in quantized)
    if has_other_factors or has_order or (first.group_size % WIDTH and not is_one_group):
        return None
    has_zeros = any(weight.zeros is not None for weight in quantized)
    tensors = _filled((_integer_units(weight, has_zeros=has_zeros) for weight in quantized), len(quantized))
    codes, scales = tensors[:2]
    group_size = -(-first.in_features // WIDTH) * WIDTH if is_one_group else first.group_size
    return ExpertCodes(codes, scales, tensors[2] if has_zeros else None, first.bits, group_size, first.in_features)


def _kind(weight: QuantizedWeight) -> tuple[object, ...]:
    has_other_factors = weight.offsets is not None, weight.superblock_scales is not None
    return weight.bits, weight.group_size, weight.shape, weight.scales.dtype, weight.scales.shape, has_other_factors


def _integer_units(weight: QuantizedWeight, *, has_zeros: bool) -> tuple[torch.Tensor, ...]:
    """One expert's codes, scales and zeros as the attributes of `ExpertCodes`."""
    padding = -weight.in_features % (WIDTH * PARTS[weight.bits])
    codes = _units(F.pad(weight.unpacked(), (0, padding)), weight.bits)
    factors = [weight.scales]
    if has_zeros:
        plain = 8 if weight.bits == 4 else 0
        factors.append(
            torch.full_like(weight.scales, plain, dtype=torch.int16) if weight.zeros is None else weight.zeros
        )
    return codes, *(factor.T for factor in factors)


def _mxfp4_units(blocks: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's codes and scales as the attributes of `ExpertCodes`."""
    out_features, num_groups = exponents.shape
    padding = -num_groups % PARTS[4]
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).view(out_features, -1)
    codes = _units(F.pad(codes, (0, padding * WIDTH)), bits=4)
    of_units = torch.zeros((out_features, num_groups + padding), dtype=torch.uint8, device=exponents.device)
    of_units[:, :num_groups] = exponents
    return codes, of_units.view(torch.int32).T


def _units(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of one matrix, `[out_features, in_features]` uint8 or int8, whole units, as `ExpertCodes` has them."""
    out_features = codes.shape[0]
    if bits == 8:
        return codes.reshape(out_features, -1, WIDTH).transpose(0, 1)
    tiles = codes.reshape(out_features, -1, PARTS[4], WIDTH)
    words = torch.stack((tiles[:, :, 0] | (tiles[:, :, 1] << 4), tiles[:, :, 2] | (tiles[:, :, 3] << 4)), dim=-1)
    return words.view(torch.int16).squeeze(-1).transpose(0, 1)


def _codes_of(units: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_units`."""
    by_output = units.transpose(0, 1)
    if bits == 4:
        by_output = torch.stack([(by_output >> (4 * part)) & 15 for part in range(PARTS[4])], dim=2)
    return by_output.reshape(units.shape[1], -1)


def _filled(parts: Iterable[tuple[torch.Tensor, ...]], num_experts: int) -> list[torch.Tensor]:
    """Tensors of every expert behind each other, contiguous; no more than one expert's are held beside them."""
    whole: list[torch.Tensor] = []
    for index, part in enumerate(parts):
        if not whole:
            whole = [torch.empty((num_experts, *one.shape), dtype=one.dtype, device=one.device) for one in part]
        for tensor, one in zip(whole, part, strict=True):
            tensor[index] = one
    return whole
