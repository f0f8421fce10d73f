"""A model's dense matrices, laid out anew for the way in which they will be multiplied, once it has been loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from ..kernels.linear_packed import PackedWeight
from ..kernels.linear_rounded import RoundedWeight
from ..kernels.quantized_weight import LinearWeight
from .attention import Attention
from .mixture import MixtureOfExperts
from .mlp import GatedMLP

log = logging.getLogger(__name__)


Pack = Callable[[torch.Tensor], PackedWeight | RoundedWeight | None]


def pack_layers(layers: Iterable[tuple[Attention, GatedMLP | MixtureOfExperts]], pack: Pack) -> int:
    """Put packed matrices in the place of dense ones, one after the other: no more than one is held twice.

    Not those of the vocabulary: the embedding reads rows of its own, and is the output projection's matrix too where
    they are tied.

    Args:
        pack: what is to take the place of a matrix; None: it stays.

    Returns:
        How many are packed now.
    """
    count = 0

    def packed(weight: LinearWeight) -> LinearWeight:
        nonlocal count
        made = pack(weight) if isinstance(weight, torch.Tensor) else None
        if made is None:
            return weight
        count += 1
        return made

    for attention, mlp in layers:
        attention.qkv = packed(attention.qkv)
        attention.o = packed(attention.o)
        for part in mlp.experts.values() if isinstance(mlp, MixtureOfExperts) else (mlp,):
            part.gate_up = packed(part.gate_up)
            part.down = packed(part.down)
    log.info("weights.packed matrices=%d", count)
    return count
