"""A `WeightReader` for GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...kernels import cpu_build
from ...kernels.quantized_weight import LinearWeight, QuantizedWeight, WeightPart
from ..errors import UnsupportedModelError
from ..quantization.partition import part_of
from ..weights import ALL, Part, WeightReader
from .weights import GGUFWeights

_EMBEDDING = "model.embed_tokens.weight"


class GGUFReader(WeightReader):
    """Reads a GGUF file under the names of a checkpoint.

    The matrices of linear layers stay quantised as they are where there is a kernel that multiplies by them so; else,
    as the embedding and all else always are, they become `dtype`.
    """

    def __init__(self, path: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(path, dtype=dtype, device=device)
        self._keeps_packed = device.type == "cpu" and cpu_build.library() is not None

    def _open(self, path: Path) -> GGUFWeights:
        return GGUFWeights(path, self.dtype)

    def take(self, name: str, *shape: int, rows: slice = ALL) -> torch.Tensor:
        """See `WeightReader.take`. What the file hands out has memory of its own already."""
        return self._read(name, shape, (rows,)).to(device=self.device, dtype=self.dtype)

    def _read_part(self, handle: Any, name: str, part: Part) -> torch.Tensor:
        """See `WeightReader._read_part`. A tensor is decoded whole, and what is not wanted let go."""
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor if all(s == ALL for s in part) else tensor[part].clone()

    def _read_linear(self, name: str, shape: tuple[int, int], part: Part = (ALL, ALL)) -> WeightPart:
        handle = self._handles.get(name)
        if self._keeps_packed and handle is not None and handle.get_slice(name).get_shape() == list(shape):
            packed: QuantizedWeight | None = handle.get_packed(name)
            if packed is not None:
                self._taken.add(name)
                return self._part(name, packed, part)
        return super()._read_linear(name, shape, part)

    def tied_head(self, embedding: torch.Tensor, rows: slice = ALL) -> LinearWeight:
        """See `WeightReader.tied_head`. The embedding's own quantised bytes, at the price of holding them too."""
        if embedding.dim() == 2 and _EMBEDDING in self:
            packed = self._handles[_EMBEDDING].get_packed(_EMBEDDING) if self._keeps_packed else None
            if packed is not None and packed.shape[1] == embedding.shape[1]:
                return self._part(_EMBEDDING, packed, (rows, ALL))
        return super().tied_head(embedding, rows)

    def _part(self, name: str, packed: QuantizedWeight, part: Part) -> QuantizedWeight:
        try:
            return part_of(packed, *part)
        except ValueError as error:
            raise UnsupportedModelError(f"{name} in {self._folder} cannot be divided among ranks: {error}") from error
