"""Ranks that never speak to the others, to see what they read of a checkpoint: no process is needed for that."""

from __future__ import annotations

from typing import Any

import torch

from octavo.kernels.quantized_weight import LinearWeight, QuantizedWeight
from octavo.models.parallel import ParallelConfig, ParallelGroup


class Unconnected(ParallelGroup):
    """A rank that never speaks to the others."""

    def _join(self, config: ParallelConfig) -> None:
        pass


def member(rank: int, tp: int, pp: int = 1, **fields: Any) -> ParallelGroup:
    """Rank `rank` of `tp * pp`."""
    return Unconnected(
        ParallelConfig(
            tensor_parallel_size=tp, pipeline_parallel_size=pp, rank=rank, init_method="file:///unused", **fields
        )
    )


def floats(weight: LinearWeight | None) -> torch.Tensor:
    """The weights that it stands for."""
    assert weight is not None
    if isinstance(weight, tuple):
        return torch.cat([floats(part) for part in weight])
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
