"""What several architectures are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .errors import UnsupportedModelError

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def activation(name: str) -> Activation:
    """The function that a configuration calls `name`."""
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide by the root mean square of the last axis, in float32; round to `x`'s dtype; multiply by `weight`.

    Rounding comes before the product, as in `transformers`; `F.rms_norm` with a weight rounds once, behind it.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    return F.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


def rms_norm_float32(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm`, but with the product in float32 too (`weight` is float32), rounding once. Gemma's."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def gated(gate_up: torch.Tensor, act: Activation) -> torch.Tensor:
    """`act(gate) * up` of `[num_tokens, 2 * n]`, whose first half is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return act(gate).mul_(up)


def layer_windows(config: Any, layer_types: list[str] | None) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for none, from the names in `layer_types`."""
    num_layers: int = config.num_hidden_layers
    window: int | None = config.sliding_window
    if layer_types is None:
        return (0,) * num_layers
    if len(layer_types) != num_layers:
        raise UnsupportedModelError(f"layer_types names {len(layer_types)} layers, num_hidden_layers={num_layers}")
    unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"layer type {', '.join(unknown)} is not supported; supported are full_attention and sliding_attention"
        )
    if "sliding_attention" in layer_types and not window:
        raise UnsupportedModelError("layer_types has sliding_attention but sliding_window is not set")
    return tuple(window if window and kind == "sliding_attention" else 0 for kind in layer_types)


def head_shape(config: Any) -> tuple[int, int, int]:
    """`(num_heads, num_kv_heads, head_dim)` of a configuration."""
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(f"{num_heads} attention heads cannot share {num_kv_heads} KV heads evenly")
    if head_dim % 2:
        raise UnsupportedModelError(f"head_dim={head_dim} is odd: rotary embedding turns pairs")
    return num_heads, num_kv_heads, head_dim
