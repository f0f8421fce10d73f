"""A model's shape from its Hugging Face `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...messages.errors import InvalidConfigError, ModelNotFoundError, UnsupportedModelError
from .model_shape import BITS, ModelShape

# Model types whose MLP has two matrices and a bias on each.
_PLAIN_MLP = {
    "gpt2",
    "opt",
    "gpt_neox",
    "gptj",
    "gpt_bigcode",
    "bloom",
    "falcon",
    "phi",
    "starcoder2",
    "codegen",
    "mpt",
}
_ALL_BIASES = {"gpt2", "opt", "gpt_neox", "gpt_bigcode", "bloom", "phi", "starcoder2"}
_QKV_BIASES = {"qwen2", "qwen2_moe"}
_QK_NORMS = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text"}
_LEARNED_POSITIONS = {"gpt2", "opt", "gpt_bigcode"}
_TIED_BY_DEFAULT = {"gpt2", "opt", "gemma", "gemma2", "gemma3", "gemma3_text", "bloom", "falcon", "gpt_bigcode"}
_NO_WINDOW_UNLESS_USED = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
_NOT_MODELLED = {
    "mamba": "state-space layers",
    "mamba2": "state-space layers",
    "jamba": "state-space layers",
    "bamba": "state-space layers",
    "falcon_h1": "state-space layers",
    "rwkv": "recurrent layers",
    "qwen3_next": "linear attention",
    "deepseek_v2": "latent attention",
    "deepseek_v3": "latent attention",
    "t5": "an encoder",
    "bart": "an encoder",
    "whisper": "an encoder",
}


class _Fields:
    """A config's fields, read with errors that name them."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def number(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The first of `names` that is there."""
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidConfigError(
                    f"{self._where}: {name} is {value!r}, but must be a whole number from {least} up", field=name
                )
            return value
        if default is None:
            raise InvalidConfigError(
                f"{self._where}: {' or '.join(names)} is missing; it must be a decoder's config.json", field=names[0]
            )
        return default

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidConfigError(f"{self._where}: {name} is {value!r}, but must be true or false", field=name)
        return value


def _dtypes(config: dict[str, Any], where: str) -> tuple[str, str]:
    """The checkpoint's dtype of weights and of KV."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = str(name).removeprefix("torch.")
    if dtype not in BITS:
        raise InvalidConfigError(f"{where}: dtype is {name!r}, but must be one of {', '.join(BITS)}", field="dtype")
    kv_dtype = dtype
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = str(quantization.get("quant_method", "")).lower()
        bits = quantization.get("bits", quantization.get("w_bit"))
        if method == "fp8" or "fp8" in method:
            return "fp8", kv_dtype
        if bits == 4 or method == "mxfp4" or quantization.get("load_in_4bit"):
            return "int4", kv_dtype
        if bits == 8 or quantization.get("load_in_8bit"):
            return "int8", kv_dtype
        raise UnsupportedModelError(
            f"{where}: quantisation {method or quantization!r} is not modelled; pass the dtype of its weights and "
            "remove quantization_config"
        )
    return dtype, kv_dtype


def _sliding(config: dict[str, Any], model_type: str, num_layers: int, fields: _Fields) -> tuple[int, int]:
    """Window, and the number of layers that have it."""
    window = fields.number("sliding_window", default=0, least=0)
    if window == 0 or (model_type in _NO_WINDOW_UNLESS_USED and not fields.flag("use_sliding_window", False)):
        return 0, 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return window, sum(kind == "sliding_attention" for kind in kinds)
    if model_type == "gemma2":
        return window, (num_layers + 1) // 2
    if model_type in ("gemma3", "gemma3_text"):
        pattern = fields.number("sliding_window_pattern", default=6, least=1)
        return window, num_layers - num_layers // pattern
    return window, num_layers


def shape_from_config(config: dict[str, Any], name: str = "") -> ModelShape:
    """Read a Hugging Face `config.json` that is parsed already.

    Args:
        config: its fields; a multimodal model's `text_config` is taken.
        name: for reports and errors; empty: the config's own.

    Raises:
        InvalidConfigError: a field is missing or malformed.
        UnsupportedModelError: an architecture whose steps are not modelled.
    """
    where = name or str(config.get("_name_or_path") or config.get("model_type") or "config")
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = {**{key: config[key] for key in ("dtype", "torch_dtype") if key in config}, **inner}
    fields = _Fields(config, where)
    model_type = str(config.get("model_type", "")).lower()
    if model_type in _NOT_MODELLED or config.get("kv_lora_rank"):
        what = _NOT_MODELLED.get(model_type, "latent attention")
        raise UnsupportedModelError(f"{where}: {model_type} has {what}, whose step times are not modelled")

    heads = _heads(fields, model_type, where)
    hidden_size, max_model_len = heads["hidden_size"], _max_model_len(fields)
    num_layers = fields.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    window, num_sliding = _sliding(config, model_type, num_layers, fields)
    weight_dtype, kv_dtype = _dtypes(config, where)
    plain_mlp = model_type in _PLAIN_MLP
    try:
        return ModelShape(
            name=where,
            num_layers=num_layers,
            vocab_size=fields.number("vocab_size"),
            max_model_len=max_model_len,
            gated_mlp=not plain_mlp,
            tied_embeddings=fields.flag("tie_word_embeddings", model_type in _TIED_BY_DEFAULT),
            attention_bias=_attention_bias(fields, model_type, **heads),
            # Layer norms of the older kinds have a bias beside the gain.
            norms_per_layer=4 if plain_mlp or model_type in _FOUR_NORMS else 2,
            qk_norm=model_type in _QK_NORMS,
            sliding_window=window,
            num_sliding_layers=num_sliding,
            other_params=hidden_size * ((max_model_len if model_type in _LEARNED_POSITIONS else 0) + plain_mlp),
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            hub_name="",
            **heads,
            **_feed_forward(config, fields, num_layers, hidden_size),
        )
    except ValueError as error:
        raise InvalidConfigError(f"{where}: {error}", field="model") from None


def _max_model_len(fields: _Fields) -> int:
    return fields.number("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", default=2048)


def _heads(fields: _Fields, model_type: str, where: str) -> dict[str, int]:
    """`hidden_size`, `num_heads`, `num_kv_heads` and `head_dim`."""
    hidden_size = fields.number("hidden_size", "n_embd", "d_model", "n_embed")
    num_heads = fields.number("num_attention_heads", "n_head", "n_heads")
    head_dim = fields.number("head_dim", default=0, least=0) or hidden_size // num_heads
    if head_dim < 1:
        raise InvalidConfigError(
            f"{where}: hidden_size={hidden_size} leaves no dimension for each of {num_heads} heads",
            field="num_attention_heads",
        )
    multi_query = model_type in ("gpt_bigcode", "falcon") and fields.flag("multi_query", True)
    num_kv_heads = fields.number("num_key_value_heads", "num_kv_heads", default=1 if multi_query else num_heads)
    if num_heads % num_kv_heads:
        raise InvalidConfigError(
            f"{where}: num_attention_heads={num_heads} must be a multiple of num_key_value_heads={num_kv_heads}",
            field="num_key_value_heads",
        )
    return {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def _attention_bias(
    fields: _Fields, model_type: str, *, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> int:
    """Parameters of one layer's biases on queries, keys and values, and on the output where it has one."""
    qkv = (num_heads + 2 * num_kv_heads) * head_dim
    if model_type in _ALL_BIASES or fields.flag("attention_bias", False):
        return qkv + hidden_size
    return qkv if model_type in _QKV_BIASES else 0


def _feed_forward(config: dict[str, Any], fields: _Fields, num_layers: int, hidden_size: int) -> dict[str, int]:
    """`intermediate_size`, and in a model with experts what `ModelShape` says of them."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    intermediate = fields.number(*names, default=4 * hidden_size)
    num_experts = fields.number("num_local_experts", "num_experts", "n_routed_experts", default=0, least=0)
    if not num_experts:
        return {"intermediate_size": intermediate}
    expert_size = fields.number("moe_intermediate_size", default=intermediate)
    num_shared = fields.number("n_shared_experts", default=0, least=0)
    num_dense = fields.number("first_k_dense_replace", default=0, least=0)
    only = config.get("mlp_only_layers")
    num_dense += len(only) if isinstance(only, list) else 0
    return {
        "intermediate_size": intermediate if num_dense else 0,
        "num_experts": num_experts,
        "num_active_experts": fields.number("num_experts_per_tok", "num_selected_experts", default=2),
        "expert_size": expert_size,
        "shared_expert_size": fields.number(
            "shared_expert_intermediate_size", default=num_shared * expert_size, least=0
        ),
        "num_dense_layers": num_dense,
    }


def read_shape(path: Path) -> ModelShape:
    """Read a `config.json`, or the one in a folder.

    Raises:
        ModelNotFoundError: there is no such file.
        InvalidConfigError, UnsupportedModelError: as `shape_from_config`, and not JSON.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelNotFoundError(f"there is no {file}; give a config.json or a folder that holds one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"{file} cannot be read: {error}", field="model") from None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidConfigError(f"{file}:{error.lineno}: not JSON: {error.msg}", field="model") from None
    if not isinstance(config, dict):
        raise InvalidConfigError(f"{file}: must hold an object, not {type(config).__name__}", field="model")
    return shape_from_config(config, str(path))
