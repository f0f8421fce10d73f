"""The configuration in a file's metadata, as the native models read it.

Source: the keys in docs/gguf.md of ggml-org/ggml and gguf-py/gguf/constants.py of ggml-org/llama.cpp, and what
`convert_hf_to_gguf.py` there writes to them. What an architecture has but no key says (Gemma's activation, its pattern
of layers) is as src/llama-model.cpp there has it.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from ..errors import UnsupportedModelError, WeightsError
from ..plain_config import PlainConfig
from .reader import GGUFFile, MetadataValue
from .tensor_names import ARCHITECTURES

# general.architecture -> model_type and architecture of the native class.
_MODEL_TYPES: Final = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

# Angles are tabulated for each position: a length from a broken file must not take all memory.
MAX_CONTEXT_LENGTH: Final = 2**24

_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def architecture_of(file: GGUFFile) -> str:
    """`general.architecture`, one of those that can be served.

    Raises:
        UnsupportedModelError: of another one, or of none.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} is of architecture {str(architecture)[:64]!r}; GGUF files are read of "
            f"{', '.join(ARCHITECTURES)}. Take the model's safetensors checkpoint"
        )
    return str(architecture)


def read_config(file: GGUFFile) -> Any:
    """What the native classes read of a configuration; `transformers`' class where it takes its code to interpret it.

    Raises:
        UnsupportedModelError: of an architecture, or with an option, that is not supported.
        WeightsError: a value is missing, or is not what the tensors say.
    """
    keys = Keys(file, architecture_of(file))
    keys.refuse("expert_count", 0, "experts (a mixture) are not read from GGUF files")
    shape = keys.shape_of("token_embd.weight", 2)
    vocab_size, hidden_size = shape
    if keys.integer("embedding_length") != hidden_size:
        raise keys.wrong("embedding_length", f"but token_embd.weight has the shape {list(shape)}")
    num_layers = keys.integer("block_count")
    for index in range(num_layers):
        # So that what is built for a layer is never more than the file has layers.
        keys.shape_of(f"blk.{index}.attn_norm.weight", 1)
    num_heads = keys.integer("attention.head_count")
    num_kv_heads = keys.integer("attention.head_count_kv", num_heads)
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    keys.refuse("attention.value_length", head_dim, "keys and values must be of one width")
    keys.refuse("rope.dimension_count", head_dim, "whole heads must turn")
    intermediate_size = keys.integer("feed_forward_length")
    context_length = keys.integer("context_length")
    if context_length > MAX_CONTEXT_LENGTH:
        raise keys.wrong("context_length", f"at most {MAX_CONTEXT_LENGTH} is read")
    for name, rows, columns in (
        ("attn_q", num_heads * head_dim, hidden_size),
        ("attn_k", num_kv_heads * head_dim, hidden_size),
        ("ffn_up", intermediate_size, hidden_size),
    ):
        found = keys.shape_of(f"blk.0.{name}.weight", 2)
        if found != (rows, columns):
            raise WeightsError(
                f"{file.path}: blk.0.{name}.weight has the shape {list(found)}, the metadata asks for "
                f"{[rows, columns]}. Convert the model again"
            )
    model_type, class_name = _MODEL_TYPES[keys.architecture]
    fields: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [class_name],
        "dtype": _stored_dtype(file),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": keys.architecture != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
    }
    if model_type in ("gemma2", "gemma3_text"):
        return _transformers_config({**fields, **_gemma_fields(keys, fields)})
    fields |= {
        "hidden_act": "silu",
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "sliding_window": None,
        "layer_types": ["full_attention"] * num_layers,
        "rope_parameters": _rope_parameters(keys, head_dim),
    }
    keys.refuse("attention.sliding_window", 0, "sliding windows are not read from files of this architecture")
    if fields["rope_parameters"]["rope_type"] in ("default", "frequency_factors"):
        return PlainConfig(**fields)
    return _transformers_config(fields)


def _transformers_config(fields: dict[str, Any]) -> Any:
    # Not at the top: a second that plain configurations do not need.
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**fields)
    except Exception as error:  # noqa: BLE001,RUF100 - each configuration class raises what it likes on bad values
        raise UnsupportedModelError(
            f"the metadata make no configuration of a {fields['model_type']}: {error}"
        ) from error


class Keys:
    """Values under an architecture's prefix, of the type that is due."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.architecture = architecture
        self._file = file

    def get(self, name: str) -> MetadataValue | None:
        return self._file.metadata.get(f"{self.architecture}.{name}")

    def wrong(self, name: str, why: str) -> WeightsError:
        return WeightsError(f"{self._file.path}: {self.architecture}.{name} is {str(self.get(name))[:64]}; {why}")

    def integer(self, name: str, default: int | None = None) -> int:
        """A number of things, at least one. A list of one for each layer counts if all are the same."""
        value = self.get(name)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu":
            if (value != value[0]).any():
                raise UnsupportedModelError(
                    f"{self._file.path}: {self.architecture}.{name} differs from layer to layer, which is not supported"
                )
            value = value[0].item()
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "a number above 0 is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.get(name)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.wrong(name, "a number above 0 is needed")
        return float(value)

    def refuse(self, name: str, accepted: float, why: str) -> None:
        """Raises unless a value is absent or the one that is supported."""
        value = self.get(name)
        if value is not None and not (isinstance(value, int | float) and value == accepted):
            raise UnsupportedModelError(
                f"{self._file.path}: {self.architecture}.{name} is {str(value)[:64]} and not {accepted}: {why}"
            )

    def shape_of(self, name: str, num_dims: int) -> tuple[int, ...]:
        info = self._file.tensors.get(name)
        if info is None:
            raise WeightsError(
                f"{self._file.path} has no tensor {name}. Was the model converted as a whole?", missing=(name,)
            )
        if len(info.shape) != num_dims:
            raise WeightsError(f"{self._file.path}: {name} has the shape {list(info.shape)}", mismatched=(name,))
        return info.shape

    def rope_factors(self, num_pairs: int) -> list[float] | None:
        """By how much each pair of a head's elements turns slower, where the file says so."""
        info = self._file.tensors.get("rope_freqs.weight")
        if info is None:
            return None
        if info.type.name != "F32" or info.shape != (num_pairs,):
            raise UnsupportedModelError(
                f"{self._file.path}: rope_freqs.weight is {info.type.name} {list(info.shape)} "
                f"instead of F32 [{num_pairs}]"
            )
        factors: list[float] = self._file.read_tensor(info).view("<f4").tolist()
        if not all(0 < factor < math.inf for factor in factors):
            raise WeightsError(f"{self._file.path}: rope_freqs.weight has a factor that is not above 0")
        return factors


def _stored_dtype(file: GGUFFile) -> str:
    """Of the largest matrices. Quantised ones hold about what bfloat16 holds, and range as far."""
    bytes_of: dict[str, int] = {}
    for info in file.tensors.values():
        if len(info.shape) > 1:
            bytes_of[info.type.name] = bytes_of.get(info.type.name, 0) + info.num_bytes
    return _DTYPES.get(max(bytes_of, key=lambda name: bytes_of[name], default=""), "bfloat16")


def _rope_parameters(keys: Keys, head_dim: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0), "rope_type": "default"}
    scaling = keys.get("rope.scaling.type")
    factors = keys.rope_factors(head_dim // 2)
    if factors is not None:  # how Llama 3.1's scaling is stored
        if scaling not in (None, "none"):
            raise UnsupportedModelError(f"rope scaling {str(scaling)[:64]!r} together with rope_freqs is not supported")
        return {**parameters, "rope_type": "frequency_factors", "factors": factors}
    match scaling:
        case None | "none":
            # Written before rope.scaling.type was: linear.
            linear = keys.number("rope.scale_linear", 1.0)
            return parameters if linear == 1.0 else {**parameters, "rope_type": "linear", "factor": linear}
        case "linear":
            return {**parameters, "rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
        case "yarn":
            for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
                keys.refuse(f"rope.scaling.{name}", 1.0, "this form of YaRN is not supported")
            keys.refuse("rope.scaling.yarn_log_multiplier", 0.0, "this form of YaRN is not supported")
            return {
                **parameters,
                "rope_type": "yarn",
                "factor": keys.number("rope.scaling.factor"),
                "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
                "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
            }
        case _:
            raise UnsupportedModelError(
                f"rope scaling {str(scaling)[:64]!r} is not supported in GGUF files; none, linear and yarn are"
            )


def _gemma_fields(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    is_gemma3 = keys.architecture == "gemma3"
    num_layers = fields["num_hidden_layers"]
    period = keys.integer("attention.sliding_window_pattern", 6 if is_gemma3 else 2)
    # The 27B models alone scale by the width of the embedding for each head; no key says so.
    is_27b = num_layers == (62 if is_gemma3 else 46)
    rope = _rope_parameters(keys, fields["head_dim"])
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (index + 1) % period else "full_attention" for index in range(num_layers)
        ],
        "query_pre_attn_scalar": fields["hidden_size"] // fields["num_attention_heads"]
        if is_27b
        else fields["head_dim"],
        "attn_logit_softcapping": None if is_gemma3 else keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": None if is_gemma3 else keys.number("final_logit_softcapping", 30.0),
        "rope_parameters": {"full_attention": rope, "sliding_attention": local} if is_gemma3 else rope,
    }
