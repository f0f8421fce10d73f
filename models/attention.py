"""Attention as every native family has it: a fused projection, rotary embedding, paged cache, output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..kernels.attention_batch import AttentionBatch
from ..kernels.attention_kind import AttentionKind
from ..kernels.decoder_stack import StackProduct
from ..kernels.paged_attention import paged_attention, write_kv
from ..kernels.rotary import rotary_and_write
from .interface import KVCache
from .layers import linear_for
from .parallel import ParallelGroup
from .sharding import share_heads
from .weights import WeightReader

TakeGain = Callable[[WeightReader, str, int], torch.Tensor]


def take_gain(reader: WeightReader, name: str, width: int) -> torch.Tensor:
    """A norm's factor as it is stored, `[width]`."""
    return reader.take(name, width)


class LayerSizes(Protocol):
    """What is the same for all of a model's layers; `eps` is that of every norm."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def eps(self) -> float: ...


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What tells one layer's attention from another's.

    Attributes:
        scale: on the dot products; None: one over the root of `head_dim`.
        qkv_bias, o_bias: which projections add a bias.
        qk_norm: queries and keys are normalised, head by head, before they turn.
        uses_rope: queries and keys turn.
        window: tokens a query looks back; 0: all.
        softcap: of the dot products; 0: none.
        has_sinks: each head's softmax has one logit more, of its own, that no value belongs to.
        take_gain: how the norms' factors are read.
    """

    sizes: LayerSizes
    scale: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    uses_rope: bool = True
    window: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    take_gain: TakeGain = take_gain


class Attention:
    """One layer's attention, or one rank's heads of it.

    Attributes:
        kind: what tells its attention from another layer's.
        linear: how both projections multiply.
        batch_invariant: a query's bits are the same alone and in any batch.
    """

    def __init__(self, reader: WeightReader, prefix: str, settings: AttentionSettings, group: ParallelGroup) -> None:
        s, sizes = settings, settings.sizes
        hidden, num_heads, head_dim = sizes.hidden_size, sizes.num_heads, sizes.head_dim
        share = share_heads(group, num_heads, sizes.num_kv_heads, head_dim)
        q_width, kv_width = num_heads * head_dim, sizes.num_kv_heads * head_dim
        qkv = [f"{prefix}.{name}_proj" for name in "qkv"]
        widths, rows = (q_width, kv_width, kv_width), (share.q, share.kv, share.kv)

        self.group, self.eps = group, sizes.eps
        self.uses_rope = s.uses_rope
        self.num_heads, self.num_kv_heads, self.head_dim = share.num_heads, share.num_kv_heads, head_dim
        self.widths = [part.stop - part.start for part in rows]
        self.linear = linear_for(reader.dtype, reader.device)
        self.batch_invariant = False

        self.qkv = reader.take_fused_linear(
            (f"{name}.weight" for name in qkv), [(width, hidden) for width in widths], rows=rows
        )
        self.qkv_bias = (
            reader.take_fused((f"{name}.bias" for name in qkv), [(width,) for width in widths], rows=rows)
            if s.qkv_bias
            else None
        )
        self.q_norm = s.take_gain(reader, f"{prefix}.q_norm.weight", head_dim) if s.qk_norm else None
        self.k_norm = s.take_gain(reader, f"{prefix}.k_norm.weight", head_dim) if s.qk_norm else None
        first = share.q.start // head_dim
        # The kernels read them in float32.
        sinks = (
            reader.take(f"{prefix}.sinks", num_heads, rows=slice(first, first + share.num_heads)).float()
            if s.has_sinks
            else None
        )
        scale = head_dim**-0.5 if s.scale is None else s.scale
        self.kind = AttentionKind(scale, s.window, s.softcap, sinks)
        self.o = reader.take_linear(f"{prefix}.o_proj.weight", hidden, q_width, columns=share.q)
        o_bias = reader.take(f"{prefix}.o_proj.bias", hidden) if s.o_bias else None
        self.o_bias = o_bias if group.tp_rank == 0 else None  # of the sum, it is part once

    def for_stack(self, cos_sin: torch.Tensor) -> dict[str, Any]:
        """What a `StackLayer` has to know of it, by its names."""
        return {
            "qkv": StackProduct(self.qkv, self.qkv_bias),
            "o": StackProduct(self.o, self.o_bias),
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "attention": self.kind,
            "qk_eps": self.eps,
            "cos_sin": cos_sin if self.uses_rope else None,
            "q_norm": self.q_norm if self.uses_rope else None,
            "k_norm": self.k_norm if self.uses_rope else None,
        }

    def forward(
        self, x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, cache: KVCache
    ) -> torch.Tensor:
        """Write the new tokens' KV and return what attention says, all ranks' heads together.

        Args:
            x: `[num_tokens, hidden_size]`, normalised.

        Returns:
            `[num_tokens, hidden_size]`, new.
        """
        num_tokens, linear = x.shape[0], self.linear
        q, k, v = linear(x, self.qkv, self.qkv_bias).split_with_sizes(self.widths, -1)
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
        attended = paged_attention(q, cache.k, cache.v, batch, self.kind, batch_invariant=self.batch_invariant)
        return self.group.all_reduce(linear(attended.view(num_tokens, -1), self.o, self.o_bias))
