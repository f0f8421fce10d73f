"""A model's dense matrices, packed for the CPU's own matrix instructions once it has been loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from ..kernels.linear_packed import Packer
from ..kernels.linear_quantized import LinearWeight
from .attention import Attention
from .mixture import MixtureOfExperts
from .mlp import GatedMLP

log = logging.getLogger(__name__)


def pack_layers(layers: Iterable[tuple[Attention, GatedMLP | MixtureOfExperts]], packer: Packer) -> int:
    """Put packed matrices in the place of dense ones, one after the other: no more than one is held twice.

    Not those of the vocabulary: the embedding reads rows of its own, and is the output projection's matrix too where
    they are tied.

    Returns:
        How many are packed now.
    """
    count = 0

    def packed(weight: LinearWeight) -> LinearWeight:
        nonlocal count
        made = packer.pack(weight) if isinstance(weight, torch.Tensor) else None
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
