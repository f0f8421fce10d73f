"""Configurations of native models that say everything themselves, read without importing `transformers`.

That import is a second of a server's start. What is not stated in so many words, or not known to be without effect, is
left to `transformers`: its defaults, its older spellings and its refusals are not repeated here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec


class PlainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the native classes read of a `transformers` configuration, by the same names and with the same values."""

    model_type: str
    architectures: list[str] | None
    dtype: str | None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    layer_types: list[str]
    rope_parameters: dict[str, Any]


class _Stated(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A config.json of which every field is understood."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    architectures: list[str] | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    # Rotary embedding without scaling, in the newer or the older spelling.
    rope_parameters: dict[str, Any] | None = None
    rope_theta: float | None = None
    rope_scaling: None = None
    # No sliding windows.
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    # Without effect on what is computed here.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    use_cache: bool = True
    pretraining_tp: int = 1
    transformers_version: str = ""


_DTYPES: Final = ("float32", "bfloat16", "float16")
_FULL: Final = "full_attention"


def read_plain_config(folder: Path) -> PlainConfig | None:
    """The configuration in a folder if it is of a Llama, Qwen2 or Qwen3 and plain; otherwise None."""
    try:
        stated = msgspec.json.decode((folder / "config.json").read_bytes(), type=_Stated)
    except (OSError, ValueError, RecursionError):
        return None
    rope_theta = _rope_theta(stated)
    dtype = stated.dtype or stated.torch_dtype
    head_dim = _head_dim(stated)
    if rope_theta is None or head_dim is None or not _has_no_windows(stated) or not _is_sound(stated):
        return None
    if (stated.dtype and stated.torch_dtype) or (dtype is not None and dtype not in _DTYPES):
        return None
    return PlainConfig(
        model_type=stated.model_type,
        architectures=stated.architectures,
        dtype=dtype,
        vocab_size=stated.vocab_size,
        hidden_size=stated.hidden_size,
        intermediate_size=stated.intermediate_size,
        num_hidden_layers=stated.num_hidden_layers,
        num_attention_heads=stated.num_attention_heads,
        num_key_value_heads=stated.num_key_value_heads,
        head_dim=head_dim,
        hidden_act=stated.hidden_act,
        max_position_embeddings=stated.max_position_embeddings,
        rms_norm_eps=stated.rms_norm_eps,
        tie_word_embeddings=stated.tie_word_embeddings,
        attention_bias=stated.attention_bias,
        mlp_bias=stated.mlp_bias,
        sliding_window=None,
        layer_types=[_FULL] * stated.num_hidden_layers,
        rope_parameters={"rope_theta": rope_theta, "rope_type": "default"},
    )


def _rope_theta(stated: _Stated) -> float | None:
    if stated.rope_parameters is None:
        return stated.rope_theta
    parameters = dict(stated.rope_parameters)
    theta = parameters.pop("rope_theta", None)
    is_plain = stated.rope_theta is None and parameters == {"rope_type": "default"} and type(theta) in (int, float)
    return float(theta) if is_plain else None


def _head_dim(stated: _Stated) -> int | None:
    if stated.head_dim is not None or stated.model_type == "qwen3":
        return stated.head_dim
    return None if stated.hidden_size % stated.num_attention_heads else stated.hidden_size // stated.num_attention_heads


def _has_no_windows(stated: _Stated) -> bool:
    if stated.model_type == "llama":
        return stated.sliding_window is None and stated.layer_types is None and not stated.use_sliding_window
    layer_types = stated.layer_types or [_FULL] * stated.num_hidden_layers
    return not stated.use_sliding_window and layer_types == [_FULL] * stated.num_hidden_layers


def _is_sound(stated: _Stated) -> bool:
    numbers = (
        *(stated.vocab_size, stated.hidden_size, stated.intermediate_size, stated.num_hidden_layers),
        *(stated.num_attention_heads, stated.num_key_value_heads, stated.max_position_embeddings),
    )
    return (
        stated.model_type in ("llama", "qwen2", "qwen3")
        and min(numbers) > 0
        and 0.0 <= stated.initializer_range <= 1.0
        and (stated.model_type != "llama" or stated.hidden_size % stated.num_attention_heads == 0)
    )
