"""The layer of most families: attention and a feed-forward part, each behind a norm and added to the residual stream.

Source: Xiong et al. 2020 (On Layer Normalization in the Transformer Architecture), with RMS norms.
"""

from __future__ import annotations

import torch

from ..kernels.attention_batch import AttentionBatch
from ..kernels.decoder_stack import StackLayer
from ..kernels.rms_norm import add_rms_norm
from .attention import Attention, LayerSizes
from .interface import KVCache
from .mixture import MixtureOfExperts
from .mlp import GatedMLP
from .weights import WeightReader


class PreNormLayer:
    """A `DecoderLayer` whose two norms stand before what they are of.

    Args:
        reader, prefix: where its norms are read.
        sizes: of the model.
        attention, mlp: its two parts.
    """

    def __init__(
        self,
        reader: WeightReader,
        prefix: str,
        sizes: LayerSizes,
        attention: Attention,
        mlp: GatedMLP | MixtureOfExperts,
    ) -> None:
        self.eps = sizes.eps
        self.input_norm = reader.take(f"{prefix}.input_layernorm.weight", sizes.hidden_size)
        self.attention = attention
        self.post_attention_norm = reader.take(f"{prefix}.post_attention_layernorm.weight", sizes.hidden_size)
        self.mlp = mlp

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
        normed = add_rms_norm(pending, x, self.input_norm, self.eps)
        attended = self.attention.forward(normed, cos_sin, positions, batch, cache)
        return self.mlp.forward(add_rms_norm(attended, x, self.post_attention_norm, self.eps))

    def for_stack(self, cos_sin: torch.Tensor) -> StackLayer | None:
        """See `DecoderLayer`; experts are none of what a stack computes."""
        if not isinstance(self.mlp, GatedMLP):
            return None
        return StackLayer(
            before_attention=self.input_norm,
            before_mlp=self.post_attention_norm,
            eps=self.eps,
            **self.attention.for_stack(cos_sin),
            **self.mlp.for_stack(),
        )
