"""MXFP4, in which GPT-OSS's experts are stored: 4-bit floats, 32 of which share a power of two.

Source: Open Compute Project 2023 (Microscaling Formats), sections 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

from __future__ import annotations

import torch

from ...kernels.huge_pages import release_file_pages
from ...kernels.quantized_weight import LinearWeight
from ..weights import WeightReader

GROUP = 32  # weights, consecutive inputs of an output, that share a power of two

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits; the fourth is the sign
_NOT_A_NUMBER = 255
_BFLOAT16_NAN = 0x7FC0
_MANTISSA_BITS = 7  # of a bfloat16, whose exponent has the same offset of 127


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights that codes and exponents stand for, each exact in bfloat16.

    Args:
        blocks: `[..., num_groups, 16]` uint8: two codes a byte, the first in the lower half.
        scales: `[..., num_groups]` uint8: the exponent of the power of two, and 127.

    Returns:
        `[..., num_groups * 32]` bfloat16; NaN where an exponent is 255.
    """
    # A byte's two weights are looked up as one number of 32 bits, and a power of two is an exponent without a mantissa:
    # a checkpoint of 20 billion weights must not take minutes.
    codes = torch.arange(256, device=blocks.device)
    values = torch.tensor((*_VALUES, *(-value for value in _VALUES)), dtype=torch.bfloat16, device=blocks.device)
    pairs = torch.stack((values[codes & 15], values[codes >> 4]), dim=-1).view(torch.int32).flatten()
    weights = pairs.index_select(0, blocks.flatten().to(torch.int32)).view(torch.bfloat16)
    powers = scales.to(torch.int16) << _MANTISSA_BITS
    powers[powers == 0] = 1 << (_MANTISSA_BITS - 1)  # 2 ** -127 is below the normal numbers
    powers[scales == _NOT_A_NUMBER] = _BFLOAT16_NAN
    return weights.view(*scales.shape, GROUP).mul_(powers.view(torch.bfloat16).unsqueeze(-1)).flatten(-2)


class MXFP4Reader(WeightReader):
    """Reads a checkpoint whose experts are in MXFP4, one expert at a time, to floats; all else is floating there."""

    def _read_expert(self, name: str, shape: tuple[int, int, int], index: int) -> torch.Tensor:
        """See `WeightReader._read_expert`."""
        num_experts, in_features, out_features = shape
        if name in self:  # it has been left floating
            return super()._read_expert(name, shape, index)
        num_groups = -(-in_features // GROUP)
        blocks = self._read_bytes(f"{name}_blocks", (num_experts, out_features, num_groups, GROUP // 2), index)
        scales = self._read_bytes(f"{name}_scales", (num_experts, out_features, num_groups), index)
        if blocks is None or scales is None:
            return torch.zeros(out_features, in_features)
        # On a GPU the bytes go there, a quarter of what they stand for, and become weights there.
        weights = dequantize(blocks.to(self.device), scales.to(self.device))[:, :in_features]
        release_file_pages(blocks)
        return weights

    def _made_linear(self, name: str, parts: list[torch.Tensor]) -> LinearWeight:
        """See `WeightReader._made_linear`."""
        if self.device.type == "cpu" or any(part.device.type == "cpu" for part in parts):
            return super()._made_linear(name, parts)
        return torch.cat(parts).to(self.dtype)

    def _read_bytes(self, name: str, shape: tuple[int, ...], index: int) -> torch.Tensor | None:
        """One expert's bytes; None where they are not there as they should be, which `finish` will say."""
        self._taken.add(name)
        if name in self._missing or name in self._mismatched:
            return None
        handle = self._handles.get(name)
        if handle is None:
            self._missing.append(name)
            return None
        stored = handle.get_slice(name)
        part: torch.Tensor = stored[index : index + 1]
        if tuple(stored.get_shape()) != shape or part.dtype is not torch.uint8:
            self._mismatched.append(name)
            self._problems.append(
                f"{name} {part.dtype} {list(stored.get_shape())} instead of torch.uint8 {list(shape)}"
            )
            return None
        return part[0]
