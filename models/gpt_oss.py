"""GPT-OSS: a mixture of experts in every layer, attention sinks, and every other layer sliding.

Sources: OpenAI 2025 (gpt-oss model card), and its implementation in `transformers`, to which the tokens are equal.
Against Llama: each head's softmax has one logit more, of its own, that no value belongs to; all projections have
biases; the router chooses before it weighs; experts are activated by a clamped SwiGLU and mostly stored in MXFP4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..kernels.attention_batch import AttentionBatch
from ..kernels.clamped_swiglu import ClampedSwiGLU
from ..kernels.paged_attention import paged_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rotary import rotary_and_write
from .errors import UnsupportedModelError
from .interface import KVCache, KVCacheSpec
from .layers import head_shape, layer_windows, linear_for
from .mixture import STACKED_NAMES, MixtureOfExperts, MixtureSettings, stack_on_device
from .parallel import ParallelGroup, alone
from .quantization.reader import inseparable_inputs, open_weights
from .quantization.scheme import Scheme
from .random_weights import RandomWeights
from .rotary import rotary_table
from .sharding import check_sizes, share_heads, stage_layers
from .vocabulary import Vocabulary
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


class GptOssLayer:
    """Attention with sinks and a mixture of experts, each behind a norm and added to the residual stream."""

    def __init__(
        self, reader: WeightReader, prefix: str, settings: GptOssSettings, index: int, group: ParallelGroup
    ) -> None:
        s, hidden, attention = settings, settings.hidden_size, f"{prefix}.self_attn"
        share = share_heads(group, s.num_heads, s.num_kv_heads, s.head_dim)
        q_width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        qkv = [f"{attention}.{name}_proj" for name in "qkv"]
        qkv_widths, qkv_rows = (q_width, kv_width, kv_width), (share.q, share.kv, share.kv)
        first_head = share.q.start // s.head_dim

        self.eps, self.group, self.window = s.eps, group, s.windows[index]
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
            if s.attention_bias
            else None
        )
        # The kernels read them in float32.
        self.sinks = reader.take(
            f"{attention}.sinks", s.num_heads, rows=slice(first_head, first_head + share.num_heads)
        ).float()
        self.o = reader.take_linear(f"{attention}.o_proj.weight", hidden, q_width, columns=share.q)
        o_bias = reader.take(f"{attention}.o_proj.bias", hidden) if s.attention_bias else None
        self.o_bias = o_bias if group.tp_rank == 0 else None  # of the sum, it is part once

        self.post_attention_norm = reader.take(f"{prefix}.post_attention_layernorm.weight", hidden)
        self.mlp = MixtureOfExperts(reader, prefix, hidden, s.mixture, s.act, group)

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
        rotary_and_write(q, k, v, cos_sin, positions, cache.k, cache.v, batch.slot_mapping)
        attended = paged_attention(
            *(q, cache.k, cache.v, batch),
            scale=self.scale,
            sliding_window=self.window,
            sinks=self.sinks,
            batch_invariant=self.batch_invariant,
        )
        x.add_(self.group.all_reduce(linear(attended.view(num_tokens, -1), self.o, self.o_bias)))
        x.add_(self.mlp.forward(rms_norm(x, self.post_attention_norm, self.eps)))


class GptOssForCausalLM:
    """A `CausalLM` of GPT-OSS.

    Args:
        folder: the checkpoint, with safetensors: experts floating or in MXFP4, which become floats as they are read.
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
        split_inputs = {"attention": s.num_heads * s.head_dim}
        if not group.expert_parallel:
            split_inputs["each expert's intermediate size"] = s.mixture.inner
        check_sizes(
            *(group, len(s.windows), s.num_heads, s.num_kv_heads, config.vocab_size, split_inputs),
            unit=inseparable_inputs(folder, quantization),
            num_experts=s.mixture.num_experts,
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
        self._eps = s.eps
        self.linear = linear_for(dtype, device)
        self._cos_sin = rotary_table(config, s.head_dim, max_model_len or self.max_position, device=device)
        with (
            torch.inference_mode(),
            open_weights(folder, dtype=dtype, device=device, quantization=quantization) as reader,
        ):
            self.vocabulary = Vocabulary(
                reader, self.vocab_size, s.hidden_size, tied=config.tie_word_embeddings, group=group
            )
            self.layers = [GptOssLayer(reader, f"model.layers.{index}", settings, index, group) for index in layers]
            reader.leave(*(f"model.layers.{index}." for index in range(len(s.windows)) if index not in layers))
            self._norm = reader.take("model.norm.weight", s.hidden_size)
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
