"""Rotary position embedding: the angles, as `transformers` computes them. `kernels.rotary` turns by them.

Source: Su et al. 2021 (RoFormer), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import UnsupportedModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional", "frequency_factors")


def rotary_table(
    config: Any, head_dim: int, max_len: int, *, device: torch.device, layer_type: str | None = None
) -> torch.Tensor:
    """Cosines and sines of every position up to `max_len`: `[max_len, head_dim]` float32, cosines in the first half.

    The scalings `dynamic` and `longrope` depend on how long the sequence is. `transformers` takes the length so far,
    which changes as a sequence grows, while its cached keys keep the old angles. Here it is the longest length that
    will be served, fixed once: a token's key is then a function of the tokens before it alone, not of how the
    prompt was cut into steps. Where `max_len` is within the length of pre-training both are the same.

    Args:
        config: a `transformers` configuration with standardised `rope_parameters`.
        head_dim: width of a head, all of which turns.
        max_len: number of positions.
        layer_type: key into `rope_parameters` where the layer types have their own.

    Raises:
        UnsupportedModelError: the rope type is unknown, or only a part of a head turns.
    """
    inv_freq, scaling = rotary_frequencies(config, head_dim, max_len, layer_type)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat((angles.cos() * scaling, angles.sin() * scaling), dim=-1).to(device)


def rotary_frequencies(
    config: Any, head_dim: int, max_len: int, layer_type: str | None = None
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `[head_dim / 2]`, float32, and the factor on cosine and sine."""
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    rope_type = parameters.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(f"rope_type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if rope_type != "proportional" and parameters.get("partial_rotary_factor") not in {None, 1.0}:
        raise UnsupportedModelError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported: whole heads turn"
        )
    if "mrope_section" in parameters:
        raise UnsupportedModelError("mrope_section (positions of several axes) is not supported")
    if rope_type in {"default", "frequency_factors"}:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq = 1.0 / (parameters["rope_theta"] ** exponents)
        if rope_type == "frequency_factors":  # of a GGUF file: each pair turns slower by a factor of its own
            inv_freq = inv_freq / torch.tensor(parameters["factors"], dtype=torch.float32)
        return inv_freq, 1.0
    # Not at the top: a second of a server's start, and most models turn without scaling.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, None, seq_len=max_len, layer_type=layer_type)
    if inv_freq.shape[0] != head_dim // 2:
        raise UnsupportedModelError(f"rope_type {rope_type!r} gives {inv_freq.shape[0]} angles for heads of {head_dim}")
    return inv_freq.float(), float(scaling)
