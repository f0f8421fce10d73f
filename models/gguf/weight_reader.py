"""A `WeightReader` for GGUF files."""

from __future__ import annotations

from pathlib import Path

import torch

from ...kernels import cpu_build
from ...kernels.linear_quantized import QuantizedWeight
from ..weights import WeightReader
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

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """See `WeightReader.take`. What the file hands out has memory of its own already."""
        return self._read(name, shape).to(device=self.device, dtype=self.dtype)

    def _read_linear(self, name: str, shape: tuple[int, int]) -> torch.Tensor | QuantizedWeight:
        handle = self._handles.get(name)
        if self._keeps_packed and handle is not None and handle.get_slice(name).get_shape() == list(shape):
            packed: QuantizedWeight | None = handle.get_packed(name)
            if packed is not None:
                self._taken.add(name)
                return packed
        return super()._read_linear(name, shape)

    def tied_head(self, embedding: torch.Tensor) -> torch.Tensor | QuantizedWeight:
        """See `WeightReader.tied_head`. The embedding's own quantised bytes, at the price of holding them too."""
        if embedding.dim() == 2 and _EMBEDDING in self:
            packed = self._handles[_EMBEDDING].get_packed(_EMBEDDING) if self._keeps_packed else None
            if packed is not None and packed.shape == tuple(embedding.shape):
                return packed  # type: ignore[no-any-return]  # handles of safetensors are untyped
        return super().tied_head(embedding)
