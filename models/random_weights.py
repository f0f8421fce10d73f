"""Random weights in place of a checkpoint's, made where they are used: a benchmark of a large model starts in seconds.

Matrices are normal with the deviation that models are initialised with, vectors that end in `norm.weight` ones and
biases zeros, so that activations stay in range. A tensor is a function of its name and the seed alone: ranks that hold
the same tensor hold the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .weights import ALL, Part, WeightReader

_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Asks `open_weights` for random weights, where a quantisation would stand.

    Attributes:
        quantized_to: what linear layers' weights are quantised to, as floating ones of a checkpoint would be; or
            "mxfp4", in which a mixture's experts alone are stored; or "fp8", where a GPU multiplies that.
        by_block, static_inputs: of fp8: scales are of blocks; inputs have one scale for all.
    """

    seed: int = 0
    quantized_to: Literal["int8", "int4", "mxfp4", "fp8"] | None = None
    by_block: bool = False
    static_inputs: bool = False


class RandomReader(WeightReader):
    """A `WeightReader` without files: every tensor that is asked for is there, in the shape that is asked for.

    Args:
        folder: for messages.
        dtype, device: of every tensor.
        seed: of all of them.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        super().__init__(folder, dtype=dtype, device=device, files=())
        self._seed = seed

    def take(self, name: str, *shape: int, rows: slice = ALL) -> torch.Tensor:
        """See `WeightReader.take`."""
        return self._made(name, shape, (rows,))

    def take_embedding(self, name: str, *shape: int, rows: slice = ALL) -> torch.Tensor:
        """See `WeightReader.take_embedding`."""
        return self._made(name, shape, (rows,))

    def _read(self, name: str, shape: tuple[int, ...], part: Part = (ALL,)) -> torch.Tensor:
        return self._made(name, shape, part)

    def _read_expert(self, name: str, shape: tuple[int, int, int], index: int) -> torch.Tensor:
        """See `WeightReader._read_expert`: an expert by itself, as a stack made for each would take long."""
        return self._made(f"{name}.{index}", (shape[2], shape[1]), (ALL, ALL))

    def _placed(self, parts: list[torch.Tensor], *, is_matrix: bool = False) -> torch.Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _release(self, floating: torch.Tensor) -> None:
        """See `WeightReader._release`; there is no file whose pages it would be."""

    def _made(self, name: str, shape: Sequence[int], part: Part) -> torch.Tensor:
        """The tensor, or the part of it: made whole and cut, as the numbers must not depend on who asks."""
        if len(shape) == 1 or name.endswith("bias"):
            value = 1.0 if name.endswith("norm.weight") else 0.0
            whole = torch.full(tuple(shape), value, dtype=self.dtype, device=self.device)
        else:
            generator = torch.Generator(self.device).manual_seed(self._seed ^ zlib.crc32(name.encode()))
            whole = torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
            whole.normal_(0.0, _DEVIATION, generator=generator)
        found = whole[part]
        return found if found.is_contiguous() and found.numel() == whole.numel() else found.clone()

    def leave(self, *beginnings: str) -> None:
        """See `WeightReader.leave`; there is nothing that could be left."""

    def finish(self) -> None:
        """See `WeightReader.finish`; nothing can be missing."""
