"""Llama and the families built like it: Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3.

Sources: Touvron et al. 2023 (Llama), Jiang et al. 2023 (Mistral 7B), Jiang et al. 2024 (Mixtral), Yang et al. 2024
(Qwen2), Yang et al. 2025 (Qwen3), and their implementations in `transformers`, to which the tokens are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..kernels.attention_batch import AttentionBatch
from ..kernels.paged_attention import paged_attention, write_kv
from ..kernels.rms_norm import rms_norm
from ..kernels.rotary import rotary_and_write
from .errors import UnsupportedModelError
from .interface import KVCache, KVCacheSpec
from .layers import GatedActivation, gated_activation, head_shape, layer_windows, linear_for
from .mixture import MixtureOfExperts, MixtureSettings, stack_on_device
from .mlp import DENSE_NAMES, GatedMLP
from .parallel import ParallelGroup, alone
from .quantization.reader import inseparable_inputs, open_weights
from .quantization.scheme import Scheme
from .random_weights import RandomWeights
from .rotary import rotary_table
from .sharding import check_sizes, share_heads, stage_layers
from .vocabulary import Vocabulary
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


class LlamaLayer:
    """Attention and gated MLP or mixture of them, each behind a norm and added to the residual stream."""

    def __init__(
        self, reader: WeightReader, prefix: str, settings: LlamaSettings, index: int, group: ParallelGroup
    ) -> None:
        s, hidden = settings, settings.hidden_size
        share = share_heads(group, s.num_heads, s.num_kv_heads, s.head_dim)
        q_width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        qkv = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        qkv_widths, qkv_rows = (q_width, kv_width, kv_width), (share.q, share.kv, share.kv)

        self.eps, self.group = s.eps, group
        self.window, self.uses_rope = s.windows[index], s.uses_rope[index]
        self.num_heads, self.num_kv_heads, self.head_dim = share.num_heads, share.num_kv_heads, s.head_dim
        self.widths, self.scale = [rows.stop - rows.start for rows in qkv_rows], s.head_dim**-0.5
        self.linear = linear_for(reader.dtype, reader.device)
        self.batch_invariant = False

        self.input_norm = reader.take(f"{prefix}.input_layernorm.weight", hidden)
        self.qkv = reader.take_fused_linear(
            (f"{name}.weight" for name in qkv), [(width, hidden) for width in qkv_widths], rows=qkv_rows
        )
        self.qkv_bias = (
            reader.take_fused((f"{name}.bias" for name in qkv), [(width,) for width in qkv_widths], rows=qkv_rows)
            if s.qkv_bias
            else None
        )
        self.q_norm = reader.take(f"{prefix}.self_attn.q_norm.weight", s.head_dim) if s.qk_norm else None
        self.k_norm = reader.take(f"{prefix}.self_attn.k_norm.weight", s.head_dim) if s.qk_norm else None
        self.o = reader.take_linear(f"{prefix}.self_attn.o_proj.weight", hidden, q_width, columns=share.q)
        o_bias = reader.take(f"{prefix}.self_attn.o_proj.bias", hidden) if s.o_bias else None
        self.o_bias = o_bias if group.tp_rank == 0 else None  # of the sum, it is part once

        self.post_attention_norm = reader.take(f"{prefix}.post_attention_layernorm.weight", hidden)
        self.mlp: GatedMLP | MixtureOfExperts
        if s.mixture is not None and s.mixture.layers[index]:
            self.mlp = MixtureOfExperts(reader, prefix, hidden, s.mixture, s.act, group)
        else:
            self.mlp = GatedMLP(
                reader, f"{prefix}.mlp", hidden, s.intermediate_size, s.act, group, with_bias=s.mlp_bias
            )

    def forward(
        self, x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, cache: KVCache
    ) -> None:
        """Add this layer's two contributions to the residual stream `x` `[num_tokens, hidden_size]`, in place."""
        num_tokens, linear = x.shape[0], self.linear
        q, k, v = linear(rms_norm(x, self.input_norm, self.eps), self.qkv, self.qkv_bias).split_with_sizes(
            self.widths, -1
        )
        q = q.view(num_tokens, self.num_heads, self.head_dim)
        k = k.view(num_tokens, self.num_kv_heads, self.head_dim)
        v = v.view(num_tokens, self.num_kv_heads, self.head_dim)
        if self.uses_rope:
            rotary_and_write(
                *(q, k, v, cos_sin, positions, cache.k, cache.v, batch.slot_mapping),
                q_weight=self.q_norm,
                k_weight=self.k_norm,
                eps=self.eps,
            )
        else:
            write_kv(k, v, cache.k, cache.v, batch.slot_mapping)
        attended = paged_attention(
            *(q, cache.k, cache.v, batch),
            scale=self.scale,
            sliding_window=self.window,
            batch_invariant=self.batch_invariant,
        )
        x.add_(self.group.all_reduce(linear(attended.view(num_tokens, -1), self.o, self.o_bias)))
        x.add_(self.mlp.forward(rms_norm(x, self.post_attention_norm, self.eps)))


class LlamaForCausalLM:
    """A `CausalLM` of the Llama-like families.

    Args:
        folder: the checkpoint, with safetensors.
        config: its `transformers` configuration.
        dtype: of weights, activations and KV.
        max_model_len: positions to prepare for; None takes the configuration's.
        quantization: how the checkpoint's weights are quantised, or what to quantise them to; None: floating.
        group: the ranks that serve the model together; None: this process alone.

    Raises:
        UnsupportedModelError: an option that is not implemented here.
        WeightsError: the files do not hold the model.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
        quantization: Scheme | RandomWeights | Literal["int8", "int4"] | None = None,
        group: ParallelGroup | None = None,
    ) -> None:
        settings = read_settings(config)
        group = group or alone()
        _check_sizes(settings, group, config.vocab_size, inseparable_inputs(folder, quantization))
        layers = stage_layers(group, len(settings.windows))
        num_kv_heads = share_heads(group, settings.num_heads, settings.num_kv_heads, settings.head_dim).num_kv_heads
        self.vocab_size: int = config.vocab_size
        self.max_position: int = config.max_position_embeddings
        self.dtype = dtype
        self.device = device
        self.kv_cache_specs = tuple(KVCacheSpec(num_kv_heads, settings.head_dim, settings.head_dim) for _ in layers)
        self.group = group
        self._hidden_size = settings.hidden_size
        self._eps = settings.eps
        self.linear = linear_for(dtype, device)
        self._cos_sin = rotary_table(config, settings.head_dim, max_model_len or self.max_position, device=device)
        with (
            torch.inference_mode(),
            open_weights(folder, dtype=dtype, device=device, quantization=quantization) as reader,
        ):
            self.vocabulary = Vocabulary(
                reader, self.vocab_size, settings.hidden_size, tied=config.tie_word_embeddings, group=group
            )
            self.layers = [LlamaLayer(reader, f"model.layers.{index}", settings, index, group) for index in layers]
            reader.leave(*(f"model.layers.{index}." for index in range(len(settings.windows)) if index not in layers))
            self._norm = reader.take("model.norm.weight", settings.hidden_size)
            reader.finish()
            stack_on_device([layer.mlp for layer in self.layers], device)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, kv_caches: list[KVCache]
    ) -> torch.Tensor:
        """See `CausalLM.forward`. Call under `torch.inference_mode()`."""
        if self.group.is_first_stage:
            x = self.vocabulary.embed(input_ids)
        else:
            x = self.group.receive_activations(len(input_ids), self._hidden_size, dtype=self.dtype, device=self.device)
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            layer.forward(x, self._cos_sin, positions, batch, cache)
        if not self.group.is_last_stage:
            self.group.send_activations(x)
            return x
        return rms_norm(x, self._norm, self._eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalLM.compute_logits`."""
        return self.vocabulary.logits(hidden, self.linear)


def _check_sizes(settings: LlamaSettings, group: ParallelGroup, vocab_size: int, unit: int) -> None:
    s, mixture = settings, settings.mixture
    split_inputs = {"attention": s.num_heads * s.head_dim}
    if mixture is None or not all(mixture.layers):
        split_inputs["intermediate_size"] = s.intermediate_size
    if mixture is not None and any(mixture.layers) and not group.expert_parallel:
        split_inputs["each expert's intermediate size"] = mixture.inner
    check_sizes(
        *(group, len(s.windows), s.num_heads, s.num_kv_heads, vocab_size, split_inputs, unit),
        num_experts=mixture.num_experts if mixture else 0,
    )
