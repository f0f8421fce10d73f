"""A stand-in for oneDNN where it does not pack bfloat16: the same layout, made and multiplied in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo.kernels.linear_packed import PackedWeight


class PanelsInTorch:
    """A `MatrixLibrary` whose tensors are `[panels, in_features / unit, panel, unit]`.

    Args:
        panel: columns beside each other.
        refuses: what `pack` raises.
        is_wrong: products are other numbers.
    """

    def __init__(self, panel: int = 64, *, refuses: Exception | None = None, is_wrong: bool = False) -> None:
        self._panel, self._refuses, self._is_wrong = panel, refuses, is_wrong
        self._num_rows: dict[int, int] = {}
        self.num_products = 0

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        if self._refuses is not None:
            raise self._refuses
        num_rows, num_inputs = weight.shape
        unit = 2 if weight.dtype is torch.bfloat16 else 1
        filled = F.pad(weight, (0, 0, 0, -num_rows % self._panel))
        packed = filled.view(-1, self._panel, num_inputs // unit, unit).transpose(1, 2).contiguous()
        self._num_rows[packed.data_ptr()] = num_rows
        return packed

    def multiply(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        self.num_products += 1
        shape = (self._num_rows[packed.data_ptr()], x.shape[1])
        weight = PackedWeight(packed, self, shape, self._panel, packed.data_ptr()).dequantize()
        return F.linear(x, weight) + (1.0 if self._is_wrong else 0.0)

    def memory(self, packed: torch.Tensor) -> torch.Tensor:
        return packed.view(-1)
