"""GPT-OSS: a mixture of experts in every layer, attention sinks, and every other layer sliding.

Sources: OpenAI 2025 (gpt-oss model card), and its implementation in `transformers`, to which the tokens are equal.
Against Llama: each head's softmax has one logit more, of its own, that no value belongs to; all projections have
biases; the router chooses before it weighs; experts are activated by a clamped SwiGLU and mostly stored in MXFP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.clamped_swiglu import ClampedSwiGLU
from .attention import Attention, AttentionSettings
from .decoder import Decoder
from .errors import UnsupportedModelError
from .layers import head_shape, layer_windows
from .mixture import STACKED_NAMES, MixtureOfExperts, MixtureSettings
from .pre_norm_layer import PreNormLayer
from .weights import WeightReader


@dataclass(frozen=True, slots=True)
class GptOssSettings:
    """What a layer has to know.

    Attributes:
        attention_bias: queries', keys', values' and output's projection add one.
        windows: sliding window of each layer, 0 for none.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    act: ClampedSwiGLU
    attention_bias: bool
    windows: tuple[int, ...]
    mixture: MixtureSettings


def read_settings(config: Any) -> GptOssSettings:
    """Settings of a `transformers` configuration.

    Raises:
        UnsupportedModelError: of another family, or with an option that is not implemented here.
    """
    if config.model_type != "gpt_oss":
        raise UnsupportedModelError(f"model_type {config.model_type!r} is not gpt_oss")
    num_experts, num_chosen = config.num_local_experts, config.num_experts_per_tok
    if not 1 <= num_chosen <= num_experts:
        raise UnsupportedModelError(f"num_experts_per_tok={num_chosen}: there are num_local_experts={num_experts}")
    num_heads, num_kv_heads, head_dim = head_shape(config)
    return GptOssSettings(
        hidden_size=config.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        act=ClampedSwiGLU(config.swiglu_alpha, config.swiglu_limit),
        attention_bias=bool(config.attention_bias),
        windows=layer_windows(config, config.layer_types),
        mixture=MixtureSettings(
            block="mlp",
            names=STACKED_NAMES,
            num_experts=num_experts,
            num_chosen=num_chosen,
            inner=config.intermediate_size,
            normalizes=False,
            rounds=True,
            layers=(True,) * config.num_hidden_layers,
            router="router",
            router_bias=True,
            of_chosen=True,
        ),
    )


class GptOssForCausalLM(Decoder):
    """A `CausalLM` of GPT-OSS, whose experts are floating or in MXFP4; on a CPU those become floats as they are read.

    See `Decoder`.
    """

    def read_settings(self, config: Any) -> GptOssSettings:
        return read_settings(config)

    def read_layer(self, reader: WeightReader, prefix: str, settings: GptOssSettings, index: int) -> PreNormLayer:
        s = settings
        attention_settings = AttentionSettings(
            s, qkv_bias=s.attention_bias, o_bias=s.attention_bias, window=s.windows[index], has_sinks=True
        )
        attention = Attention(reader, f"{prefix}.self_attn", attention_settings, self.group)
        mlp = MixtureOfExperts(reader, prefix, s.hidden_size, s.mixture, s.act, self.group)
        return PreNormLayer(reader, prefix, s, attention, mlp)

    def divided(self, settings: GptOssSettings) -> tuple[Mapping[str, int], int]:
        s = settings
        split_inputs = {"attention": s.num_heads * s.head_dim}
        if not self.group.expert_parallel:
            split_inputs["each expert's intermediate size"] = s.mixture.inner
        return split_inputs, s.mixture.num_experts
