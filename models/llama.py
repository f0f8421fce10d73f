"""Llama and the families built like it: Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3.

Sources: Touvron et al. 2023 (Llama), Jiang et al. 2023 (Mistral 7B), Jiang et al. 2024 (Mixtral), Yang et al. 2024
(Qwen2), Yang et al. 2025 (Qwen3), and their implementations in `transformers`, to which the tokens are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.gated_activation import GatedActivation
from .attention import Attention, AttentionSettings
from .decoder import Decoder
from .errors import UnsupportedModelError
from .layers import gated_activation, head_shape, layer_windows
from .mixture import MixtureOfExperts, MixtureSettings
from .mlp import DENSE_NAMES, GatedMLP
from .pre_norm_layer import PreNormLayer
from .weights import WeightReader


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """What tells these families apart.

    Attributes:
        qkv_bias, o_bias, mlp_bias: which projections add a bias.
        qk_norm: queries and keys are normalised, head by head, before they turn.
        windows: sliding window of each layer, 0 for none.
        uses_rope: whether a layer's queries and keys turn.
        mixture: of experts; None for families without.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    act: GatedActivation
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    uses_rope: tuple[bool, ...]
    mixture: MixtureSettings | None = None


def read_settings(config: Any) -> LlamaSettings:
    """Settings of a `transformers` configuration.

    Raises:
        UnsupportedModelError: of another family, or with an option that is not implemented here.
    """
    num_layers = config.num_hidden_layers
    attention_bias = bool(getattr(config, "attention_bias", False))
    qkv_bias, o_bias = attention_bias, attention_bias
    mlp_bias, qk_norm = bool(getattr(config, "mlp_bias", False)), False
    windows, uses_rope = (0,) * num_layers, (True,) * num_layers
    mixture = None
    match config.model_type:
        case "llama":
            pass
        case "mistral":
            qkv_bias = o_bias = mlp_bias = False
            windows = (config.sliding_window or 0,) * num_layers
        case "mixtral":
            qkv_bias = o_bias = mlp_bias = False
            windows = (config.sliding_window or 0,) * num_layers
            mixture = MixtureSettings(
                block="block_sparse_moe",
                names=("w1", "w3", "w2"),
                num_experts=config.num_local_experts,
                num_chosen=config.num_experts_per_tok,
                inner=config.intermediate_size,
                normalizes=True,
                rounds=False,
                layers=(True,) * num_layers,
            )
        case "qwen3_moe":
            mlp_bias, qk_norm = False, True
            windows = (config.sliding_window or 0,) * num_layers
            mixture = MixtureSettings(
                block="mlp",
                names=DENSE_NAMES,
                num_experts=config.num_experts,
                num_chosen=config.num_experts_per_tok,
                inner=config.moe_intermediate_size,
                normalizes=config.norm_topk_prob,
                rounds=True,
                layers=tuple(
                    config.num_experts > 0
                    and index not in config.mlp_only_layers
                    and (index + 1) % config.decoder_sparse_step == 0
                    for index in range(num_layers)
                ),
            )
        case "qwen2":
            qkv_bias, o_bias, mlp_bias = True, False, False
            windows = layer_windows(config, config.layer_types)
        case "qwen3":
            mlp_bias, qk_norm = False, True
            windows = layer_windows(config, config.layer_types)
        case "smollm3":
            windows = layer_windows(config, config.layer_types)
            uses_rope = tuple(bool(rope) for rope in config.no_rope_layers[:num_layers])  # 0 there means none
            if len(uses_rope) < num_layers:
                raise UnsupportedModelError(f"no_rope_layers has {len(uses_rope)} entries for {num_layers} layers")
        case other:
            raise UnsupportedModelError(f"model_type {other!r} is not a Llama-like family")
    num_heads, num_kv_heads, head_dim = head_shape(config)
    return LlamaSettings(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        act=gated_activation(config.hidden_act),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=windows,
        uses_rope=uses_rope,
        mixture=mixture,
    )


class LlamaForCausalLM(Decoder):
    """A `CausalLM` of the Llama-like families; see `Decoder`."""

    def read_settings(self, config: Any) -> LlamaSettings:
        return read_settings(config)

    def read_layer(self, reader: WeightReader, prefix: str, settings: LlamaSettings, index: int) -> PreNormLayer:
        s, hidden, group = settings, settings.hidden_size, self.group
        attention_settings = AttentionSettings(
            s,
            qkv_bias=s.qkv_bias,
            o_bias=s.o_bias,
            qk_norm=s.qk_norm,
            uses_rope=s.uses_rope[index],
            window=s.windows[index],
        )
        attention = Attention(reader, f"{prefix}.self_attn", attention_settings, group)
        mlp: GatedMLP | MixtureOfExperts
        if s.mixture is not None and s.mixture.layers[index]:
            mlp = MixtureOfExperts(reader, prefix, hidden, s.mixture, s.act, group)
        else:
            mlp = GatedMLP(reader, f"{prefix}.mlp", hidden, s.intermediate_size, s.act, group, with_bias=s.mlp_bias)
        return PreNormLayer(reader, prefix, s, attention, mlp)

    def divided(self, settings: LlamaSettings) -> tuple[Mapping[str, int], int]:
        s, mixture = settings, settings.mixture
        split_inputs = {"attention": s.num_heads * s.head_dim}
        if mixture is None or not all(mixture.layers):
            split_inputs["intermediate_size"] = s.intermediate_size
        if mixture is not None and any(mixture.layers) and not self.group.expert_parallel:
            split_inputs["each expert's intermediate size"] = mixture.inner
        return split_inputs, mixture.num_experts if mixture else 0
