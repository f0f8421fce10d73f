"""The sizes of a model that decide how long a step takes and how much memory it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from ...actors.kv_allocator.sizing import kv_row_bytes
from ...messages.errors import InvalidConfigError, ModelNotFoundError, UnsupportedModelError

BITS: dict[str, int] = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8, "int8": 8, "int4": 4}


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's sizes.

    Attributes:
        intermediate_size: of a dense layer's MLP; 0 where every layer has experts.
        max_model_len: longest sequence the checkpoint was made for.
        gated_mlp: three matrices in an MLP rather than two.
        tied_embeddings: the output matrix is the embedding table.
        attention_bias: parameters of biases in one layer's attention.
        norms_per_layer: gains of `hidden_size` in a layer.
        qk_norm: gains of `head_dim` on queries and keys.
        num_experts, num_active_experts: routed experts of a layer, and how many a token visits; 0: dense.
        expert_size: intermediate size of one expert.
        shared_expert_size: intermediate size of what every token visits beside them; 0: none.
        num_dense_layers: of `num_layers`, those with a dense MLP, in a model with experts.
        sliding_window: tokens that a layer with a window looks back; 0: none.
        num_sliding_layers: layers with a window.
        other_params: learned positions, the last norm's bias; read once a step at most, never multiplied with.
        weight_dtype, kv_dtype: keys of `BITS`.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    attention_bias: int = 0
    norms_per_layer: int = 2
    qk_norm: bool = False
    num_experts: int = 0
    num_active_experts: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    num_dense_layers: int = 0
    sliding_window: int = 0
    num_sliding_layers: int = 0
    other_params: int = 0
    weight_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len} must be at least 2")
        if self.num_experts and not 1 <= self.num_active_experts <= self.num_experts:
            raise ValueError(
                f"num_active_experts={self.num_active_experts} must be from 1 to num_experts={self.num_experts}"
            )
        for field in ("weight_dtype", "kv_dtype"):
            if getattr(self, field) not in BITS:
                raise ValueError(f"{field}={getattr(self, field)!r} must be one of {', '.join(BITS)}")

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def attention_params(self) -> int:
        """Weights of one layer's four projections, biases included."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return 2 * self.hidden_size * (q_size + kv_size) + self.attention_bias

    @property
    def expert_params(self) -> int:
        """Weights of one expert."""
        return (3 if self.gated_mlp else 2) * self.hidden_size * self.expert_size

    @property
    def head_params(self) -> int:
        """Weights that turn a hidden state into logits."""
        return self.vocab_size * self.hidden_size

    @property
    def dense_params(self) -> int:
        """Weights of all layers that every token meets: attention, dense MLPs, routers, shared experts."""
        matrices = 3 if self.gated_mlp else 2
        dense_mlp = matrices * self.hidden_size * self.intermediate_size
        if not self.gated_mlp:
            dense_mlp += self.hidden_size + self.intermediate_size  # biases, which models of this kind have
        num_moe = self.num_moe_layers
        return (
            self.num_layers * self.attention_params
            + (self.num_layers - num_moe) * dense_mlp
            + num_moe * self.hidden_size * (self.num_experts + matrices * self.shared_expert_size)
        )

    @property
    def num_params(self) -> int:
        """All parameters, a tied embedding counted once."""
        norms = self.norms_per_layer * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return (
            self.dense_params
            + self.num_moe_layers * self.num_experts * self.expert_params
            + self.num_layers * norms
            + self.hidden_size
            + (1 if self.tied_embeddings else 2) * self.head_params
            + self.other_params
        )

    @property
    def num_active_params(self) -> int:
        """Parameters that one token is multiplied with."""
        return self.dense_params + self.num_moe_layers * self.num_active_experts * self.expert_params + self.head_params

    @property
    def weight_bytes(self) -> int:
        """Memory of all parameters."""
        return -(-self.num_params * BITS[self.weight_dtype] // 8)

    def kv_heads_per_rank(self, tp: int) -> int:
        """KV heads that one GPU of `tp` holds; at least one, a copy of another's if need be."""
        return max(1, self.num_kv_heads // tp)

    def kv_bytes_per_token(self, tp: int = 1) -> int:
        """KV cache that a token takes on each GPU of a tensor-parallel group, all layers."""
        heads = self.kv_heads_per_rank(tp)
        return 2 * self.num_layers * heads * kv_row_bytes(self.head_dim, self.kv_dtype, BITS[self.kv_dtype])

    def with_dtype(self, dtype: str, kv_dtype: str | None = None) -> ModelShape:
        """The same model in another precision; KV in the weights' where those are floats of 16 bits or more.

        Raises:
            InvalidConfigError: not a key of `BITS`.
        """
        dtype = "bfloat16" if dtype == "auto" and self.weight_dtype not in BITS else dtype
        weight_dtype = self.weight_dtype if dtype == "auto" else dtype
        for field, value in (("dtype", weight_dtype), ("kv_dtype", kv_dtype)):
            if value is not None and value not in BITS:
                raise InvalidConfigError(f"{field} is {value!r}, but must be auto or {', '.join(BITS)}", field=field)
        if kv_dtype is None:
            kv_dtype = self.kv_dtype if dtype == "auto" else weight_dtype if BITS[weight_dtype] >= 16 else "bfloat16"
        return msgspec.structs.replace(self, weight_dtype=weight_dtype, kv_dtype=kv_dtype)


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

    num_layers = fields.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
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
    vocab_size = fields.number("vocab_size")
    max_model_len = fields.number("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", default=2048)

    num_experts = fields.number("num_local_experts", "num_experts", "n_routed_experts", default=0, least=0)
    num_active = fields.number("num_experts_per_tok", "num_selected_experts", default=2) if num_experts else 0
    intermediate = fields.number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden_size)
    expert_size = fields.number("moe_intermediate_size", default=intermediate) if num_experts else 0
    shared = 0
    if num_experts:
        num_shared = fields.number("n_shared_experts", default=0, least=0)
        shared = fields.number("shared_expert_intermediate_size", default=num_shared * expert_size, least=0)
    num_dense = num_layers
    if num_experts:
        num_dense = fields.number("first_k_dense_replace", default=0, least=0)
        only = config.get("mlp_only_layers")
        num_dense += len(only) if isinstance(only, list) else 0

    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    bias = 0
    if model_type in _ALL_BIASES or fields.flag("attention_bias", False):
        bias = q_size + 2 * kv_size + hidden_size
    elif model_type in _QKV_BIASES:
        bias = q_size + 2 * kv_size
    window, num_sliding = _sliding(config, model_type, num_layers, fields)
    weight_dtype, kv_dtype = _dtypes(config, where)
    plain_mlp = model_type in _PLAIN_MLP
    try:
        return ModelShape(
            name=where,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=intermediate if num_dense else 0,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            gated_mlp=not plain_mlp,
            tied_embeddings=fields.flag("tie_word_embeddings", model_type in _TIED_BY_DEFAULT),
            attention_bias=bias,
            # Layer norms of the older kinds have a bias beside the gain.
            norms_per_layer=4 if plain_mlp or model_type in _FOUR_NORMS else 2,
            qk_norm=model_type in _QK_NORMS,
            num_experts=num_experts,
            num_active_experts=num_active,
            expert_size=expert_size,
            shared_expert_size=shared,
            num_dense_layers=num_dense if num_experts else 0,
            sliding_window=window,
            num_sliding_layers=num_sliding,
            other_params=hidden_size * ((max_model_len if model_type in _LEARNED_POSITIONS else 0) + plain_mlp),
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
        )
    except ValueError as error:
        raise InvalidConfigError(f"{where}: {error}", field="model") from None


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
