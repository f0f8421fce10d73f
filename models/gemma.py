"""Gemma 2 and the text part of Gemma 3.

Sources: Gemma Team 2024 (Gemma 2), Gemma Team 2025 (Gemma 3), and their implementations in `transformers`, to which
the tokens are equal. Against Llama: norms multiply by 1 + weight in float32 and stand before and behind each block;
embeddings are scaled; most layers slide; Gemma 2 caps its logits softly; Gemma 3 normalises queries and keys and turns
them by other angles in sliding layers than in global ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.attention_batch import AttentionBatch
from ..kernels.decoder_stack import StackLayer
from ..kernels.gated_activation import GatedActivation
from ..kernels.rms_norm import add_rms_norm, rms_norm
from .attention import Attention, AttentionSettings
from .decoder import Decoder
from .errors import UnsupportedModelError
from .interface import KVCache
from .layers import gated_activation, head_shape, layer_windows
from .mlp import GatedMLP
from .parallel import ParallelGroup
from .rotary import rotary_table
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
        self.eps = s.eps
        self.input_norm = take_gain(reader, f"{prefix}.input_layernorm.weight", hidden)
        self.attention = Attention(
            reader,
            f"{prefix}.self_attn",
            AttentionSettings(
                s,
                scale=s.scale,
                qkv_bias=s.attention_bias,
                o_bias=s.attention_bias,
                qk_norm=s.qk_norm,
                window=s.windows[index],
                softcap=s.attention_softcap,
                take_gain=take_gain,
            ),
            group,
        )
        self.post_attention_norm = take_gain(reader, f"{prefix}.post_attention_layernorm.weight", hidden)
        self.pre_mlp_norm = take_gain(reader, f"{prefix}.pre_feedforward_layernorm.weight", hidden)
        self.mlp = GatedMLP(reader, f"{prefix}.mlp", hidden, s.intermediate_size, s.act, group)
        self.post_mlp_norm = take_gain(reader, f"{prefix}.post_feedforward_layernorm.weight", hidden)

    def forward(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        *,
        pending: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `DecoderLayer`."""
        eps = self.eps
        normed = add_rms_norm(pending, x, self.input_norm, eps)
        attended = rms_norm(
            self.attention.forward(normed, cos_sin, positions, batch, cache), self.post_attention_norm, eps
        )
        normed = add_rms_norm(attended, x, self.pre_mlp_norm, eps)
        return rms_norm(self.mlp.forward(normed), self.post_mlp_norm, eps)

    def for_stack(self, cos_sin: torch.Tensor) -> StackLayer | None:
        """See `DecoderLayer`."""
        return StackLayer(
            before_attention=self.input_norm,
            after_attention=self.post_attention_norm,
            before_mlp=self.pre_mlp_norm,
            after_mlp=self.post_mlp_norm,
            eps=self.eps,
            **self.attention.for_stack(cos_sin),
            **self.mlp.for_stack(),
        )


def take_gain(reader: WeightReader, name: str, width: int) -> torch.Tensor:
    """A norm's factor, `1 + weight`, `[width]` float32."""
    return reader.take(name, width).float() + 1.0


def softcap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap * tanh(x / cap)`, in place."""
    return x.div_(cap).tanh_().mul_(cap)


class GemmaForCausalLM(Decoder):
    """A `CausalLM` of Gemma 2 or Gemma 3 text; see `Decoder`."""

    take_gain = staticmethod(take_gain)

    def __init__(self, folder: Path, config: Any, *, dtype: torch.dtype, **others: Any) -> None:
        super().__init__(folder, config, dtype=dtype, **others)
        self._final_softcap: float = config.final_logit_softcapping or 0.0
        self.softcap: Callable[[torch.Tensor, float], torch.Tensor] = softcap_
        # Rounded to the model's dtype, as the checkpoints were trained: 55.4256 is 55.5 in bfloat16.
        self._embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=dtype))

    def read_settings(self, config: Any) -> GemmaSettings:
        return read_settings(config)

    def read_layer(self, reader: WeightReader, prefix: str, settings: GemmaSettings, index: int) -> GemmaLayer:
        return GemmaLayer(reader, prefix, settings, index, self.group)

    def divided(self, settings: GemmaSettings) -> tuple[Mapping[str, int], int]:
        s = settings
        return {"attention": s.num_heads * s.head_dim, "intermediate_size": s.intermediate_size}, 0

    def rotary_tables(self, config: Any, settings: GemmaSettings, layers: range, max_len: int) -> list[torch.Tensor]:
        # Gemma 3 has angles for each type of layer; Gemma 2 shares one set, named None.
        keys = [settings.layer_types[index] if settings.qk_norm else None for index in layers]
        tables = {
            key: rotary_table(config, settings.head_dim, max_len, device=self.device, layer_type=key)
            for key in dict.fromkeys(keys)
        }
        return [tables[key] for key in keys]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().embed(input_ids).mul_(self._embedding_scale)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalLM.compute_logits`."""
        logits = super().compute_logits(hidden)
        if self._final_softcap > 0:
            self.softcap(logits, self._final_softcap)
        return logits
