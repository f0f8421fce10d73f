"""Gemma 2 and the text part of Gemma 3.

Sources: Gemma Team 2024 (Gemma 2), Gemma Team 2025 (Gemma 3), and their implementations in `transformers`, to which
the tokens are equal. Against Llama: norms multiply by 1 + weight in float32 and stand before and behind each block;
embeddings are scaled; most layers slide; Gemma 2 caps its logits softly; Gemma 3 normalises queries and keys and turns
them by other angles in sliding layers than in global ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..kernels.attention_batch import AttentionBatch
from ..kernels.paged_attention import paged_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rotary import rotary_and_write
from .errors import UnsupportedModelError
from .interface import KVCache, KVCacheSpec
from .layers import GatedActivation, gated_activation, head_shape, layer_windows, linear_for
from .mlp import GatedMLP
from .parallel import ParallelGroup, alone
from .quantization.reader import inseparable_inputs, open_weights
from .quantization.scheme import Scheme
from .random_weights import RandomWeights
from .rotary import rotary_table
from .sharding import check_sizes, share_heads, stage_layers
from .vocabulary import Vocabulary
from .weights import WeightReader


@dataclass(frozen=True, slots=True)
class GemmaSettings:
    """What a layer has to know.

    Attributes:
        scale: on the dot products, from `query_pre_attn_scalar` and not from the width of a head.
        attention_softcap: 0 for none.
        qk_norm: queries and keys are normalised, head by head, before they turn.
        windows: sliding window of each layer, 0 for global ones.
        layer_types: `sliding_attention` or `full_attention`, for each layer.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    act: GatedActivation
    scale: float
    attention_softcap: float
    attention_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    layer_types: tuple[str, ...]


def read_settings(config: Any) -> GemmaSettings:
    """Settings of a `transformers` configuration.

    Raises:
        UnsupportedModelError: of another family, or with an option that is not implemented here.
    """
    if config.model_type not in {"gemma2", "gemma3_text"}:
        raise UnsupportedModelError(f"model_type {config.model_type!r} is neither gemma2 nor gemma3_text")
    if config.use_bidirectional_attention:
        raise UnsupportedModelError("use_bidirectional_attention makes an encoder; only causal attention is supported")
    is_gemma3 = config.model_type == "gemma3_text"
    num_heads, num_kv_heads, head_dim = head_shape(config)
    return GemmaSettings(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        act=gated_activation(config.hidden_activation),
        scale=config.query_pre_attn_scalar**-0.5,
        # Gemma 3 has the option in its configuration, but its attention does not read it.
        attention_softcap=0.0 if is_gemma3 else config.attn_logit_softcapping or 0.0,
        attention_bias=bool(config.attention_bias),
        qk_norm=is_gemma3,
        windows=layer_windows(config, config.layer_types),
        layer_types=tuple(config.layer_types),
    )


class GemmaLayer:
    """Attention and gated MLP, each between two norms and added to the residual stream."""

    def __init__(
        self, reader: WeightReader, prefix: str, settings: GemmaSettings, index: int, group: ParallelGroup
    ) -> None:
        s, hidden = settings, settings.hidden_size
        share = share_heads(group, s.num_heads, s.num_kv_heads, s.head_dim)
        q_width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        qkv = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        qkv_widths, qkv_rows = (q_width, kv_width, kv_width), (share.q, share.kv, share.kv)

        self.eps, self.group = s.eps, group
        self.window, self.softcap, self.scale = s.windows[index], s.attention_softcap, s.scale
        self.num_heads, self.num_kv_heads, self.head_dim = share.num_heads, share.num_kv_heads, s.head_dim
        self.widths = [rows.stop - rows.start for rows in qkv_rows]
        self.linear = linear_for(reader.dtype, reader.device)
        self.batch_invariant = False

        self.input_norm = take_gain(reader, f"{prefix}.input_layernorm.weight", hidden)
        self.qkv = reader.take_fused_linear(
            (f"{name}.weight" for name in qkv), [(width, hidden) for width in qkv_widths], rows=qkv_rows
        )
        self.qkv_bias = (
            reader.take_fused((f"{name}.bias" for name in qkv), [(width,) for width in qkv_widths], rows=qkv_rows)
            if s.attention_bias
            else None
        )
        self.q_norm = take_gain(reader, f"{prefix}.self_attn.q_norm.weight", s.head_dim) if s.qk_norm else None
        self.k_norm = take_gain(reader, f"{prefix}.self_attn.k_norm.weight", s.head_dim) if s.qk_norm else None
        self.o = reader.take_linear(f"{prefix}.self_attn.o_proj.weight", hidden, q_width, columns=share.q)
        o_bias = reader.take(f"{prefix}.self_attn.o_proj.bias", hidden) if s.attention_bias else None
        self.o_bias = o_bias if group.tp_rank == 0 else None  # of the sum, it is part once
        self.post_attention_norm = take_gain(reader, f"{prefix}.post_attention_layernorm.weight", hidden)

        self.pre_mlp_norm = take_gain(reader, f"{prefix}.pre_feedforward_layernorm.weight", hidden)
        self.mlp = GatedMLP(reader, f"{prefix}.mlp", hidden, s.intermediate_size, s.act, group)
        self.post_mlp_norm = take_gain(reader, f"{prefix}.post_feedforward_layernorm.weight", hidden)

    def forward(
        self, x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, cache: KVCache
    ) -> None:
        """Add this layer's two contributions to the residual stream `x` `[num_tokens, hidden_size]`, in place."""
        num_tokens, linear, eps = x.shape[0], self.linear, self.eps
        q, k, v = linear(rms_norm(x, self.input_norm, eps), self.qkv, self.qkv_bias).split_with_sizes(self.widths, -1)
        q = q.view(num_tokens, self.num_heads, self.head_dim)
        k = k.view(num_tokens, self.num_kv_heads, self.head_dim)
        v = v.view(num_tokens, self.num_kv_heads, self.head_dim)
        rotary_and_write(
            *(q, k, v, cos_sin, positions, cache.k, cache.v, batch.slot_mapping),
            q_weight=self.q_norm,
            k_weight=self.k_norm,
            eps=eps,
        )
        attended = paged_attention(
            *(q, cache.k, cache.v, batch),
            scale=self.scale,
            sliding_window=self.window,
            softcap=self.softcap,
            batch_invariant=self.batch_invariant,
        )
        attended = self.group.all_reduce(linear(attended.view(num_tokens, -1), self.o, self.o_bias))
        x.add_(rms_norm(attended, self.post_attention_norm, eps))
        x.add_(rms_norm(self.mlp.forward(rms_norm(x, self.pre_mlp_norm, eps)), self.post_mlp_norm, eps))


def take_gain(reader: WeightReader, name: str, width: int) -> torch.Tensor:
    """A norm's factor, `1 + weight`, `[width]` float32."""
    return reader.take(name, width).float() + 1.0


def softcap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap * tanh(x / cap)`, in place."""
    return x.div_(cap).tanh_().mul_(cap)


class GemmaForCausalLM:
    """A `CausalLM` of Gemma 2 or Gemma 3 text.

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
        settings = s = read_settings(config)
        group = group or alone()
        split_inputs = {"attention": s.num_heads * s.head_dim, "intermediate_size": s.intermediate_size}
        check_sizes(
            *(group, len(s.windows), s.num_heads, s.num_kv_heads, config.vocab_size, split_inputs),
            unit=inseparable_inputs(folder, quantization),
        )
        layers = stage_layers(group, len(s.windows))
        num_kv_heads = share_heads(group, s.num_heads, s.num_kv_heads, s.head_dim).num_kv_heads
        self.vocab_size: int = config.vocab_size
        self.max_position: int = config.max_position_embeddings
        self.dtype = dtype
        self.device = device
        self.kv_cache_specs = tuple(KVCacheSpec(num_kv_heads, s.head_dim, s.head_dim) for _ in layers)
        self.group = group
        self._hidden_size = s.hidden_size
        self._eps = settings.eps
        self._final_softcap: float = config.final_logit_softcapping or 0.0
        self.softcap: Callable[[torch.Tensor, float], torch.Tensor] = softcap_
        # Rounded to the model's dtype, as the checkpoints were trained: 55.4256 is 55.5 in bfloat16.
        self._embedding_scale = float(torch.tensor(settings.hidden_size**0.5, dtype=dtype))
        # Gemma 3 has angles for each type of layer; Gemma 2 shares one set, named None.
        self._angle_keys = [settings.layer_types[index] if settings.qk_norm else None for index in layers]
        self.linear = linear_for(dtype, device)
        max_len = max_model_len or self.max_position
        self._cos_sin = {
            key: rotary_table(config, settings.head_dim, max_len, device=device, layer_type=key)
            for key in dict.fromkeys(self._angle_keys)
        }
        with (
            torch.inference_mode(),
            open_weights(folder, dtype=dtype, device=device, quantization=quantization) as reader,
        ):
            self.vocabulary = Vocabulary(
                reader, self.vocab_size, settings.hidden_size, tied=config.tie_word_embeddings, group=group
            )
            self.layers = [GemmaLayer(reader, f"model.layers.{index}", settings, index, group) for index in layers]
            reader.leave(*(f"model.layers.{index}." for index in range(len(settings.windows)) if index not in layers))
            self._norm = take_gain(reader, "model.norm.weight", settings.hidden_size)
            reader.finish()

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, kv_caches: list[KVCache]
    ) -> torch.Tensor:
        """See `CausalLM.forward`. Call under `torch.inference_mode()`."""
        if self.group.is_first_stage:
            x = self.vocabulary.embed(input_ids).mul_(self._embedding_scale)
        else:
            x = self.group.receive_activations(len(input_ids), self._hidden_size, dtype=self.dtype, device=self.device)
        for layer, key, cache in zip(self.layers, self._angle_keys, kv_caches, strict=True):
            layer.forward(x, self._cos_sin[key], positions, batch, cache)
        if not self.group.is_last_stage:
            self.group.send_activations(x)
            return x
        return rms_norm(x, self._norm, self._eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalLM.compute_logits`."""
        logits = self.vocabulary.logits(hidden, self.linear)
        if self._final_softcap > 0:
            self.softcap(logits, self._final_softcap)
        return logits
