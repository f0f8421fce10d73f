"""Rotary embeddings of `transformers` that would follow the length of the batch."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .transformers_support import LENGTH_DEPENDENT_ROPE_TYPES, max_position_of, rope_parameters_of


def settle_rope(config: Any, decoder: nn.Module, max_model_len: int | None) -> int:
    """Fix rotary frequencies that would follow the length of the batch; returns the longest context that is exact."""
    max_position = max_position_of(config)
    for parameters in rope_parameters_of(config):
        if parameters.get("rope_type") not in LENGTH_DEPENDENT_ROPE_TYPES:
            continue
        original = parameters.get("original_max_position_embeddings") or max_position
        if parameters["rope_type"] == "longrope" and max_model_len is not None and max_model_len > original:
            _use_long_frequencies(decoder, original)
        else:
            max_position = min(max_position, original)
    return max_position


def _use_long_frequencies(decoder: nn.Module, original_max_position: int) -> None:
    """Put the long rotary frequencies in the short ones' place, so that either choice at run time is the long set."""
    for module in decoder.modules():
        rope_type = getattr(module, "rope_type", None)
        named = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        for layer_type, name in named.items():
            if name != "longrope":
                continue
            prefix = "" if layer_type is None else f"{layer_type}_"
            frequencies = getattr(module, f"{prefix}inv_freq")
            long, _ = ROPE_INIT_FUNCTIONS["longrope"](
                module.config, frequencies.device, seq_len=original_max_position + 1, layer_type=layer_type
            )
            setattr(module, f"{prefix}original_inv_freq", long)
            frequencies.copy_(long)
