"""What the executor asks of any model, native or through transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..kernels.attention_batch import AttentionBatch
from ..kernels.kv_quantization import row_width


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Shape of one attention layer's cache.

    Attributes:
        num_kv_heads: heads of K and V.
        k_head_dim, v_head_dim: their widths (they differ in multi-head latent attention).
    """

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """What one token takes in a cache of `dtype`, a quantised one's scales included."""
        widths = row_width(self.k_head_dim, dtype) + row_width(self.v_head_dim, dtype)
        return self.num_kv_heads * widths * dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's cache, head-major so that a head's tokens within a block are contiguous.

    Attributes:
        k: `[num_blocks, num_kv_heads, block_size, k_head_dim]`; four wider in int8 and fp8, see `kv_quantization`.
        v: `[num_blocks, num_kv_heads, block_size, v_head_dim]`, likewise.
    """

    k: torch.Tensor
    v: torch.Tensor


class CausalLM(Protocol):
    """A decoder that reads and writes a paged KV cache.

    Attributes:
        vocab_size: width of the logits.
        max_position: longest context the checkpoint was made for.
        dtype: of weights and activations, and of KV unless the executor was told otherwise.
        device: where the weights are.
        kv_cache_specs: one entry for each layer that keeps KV; `kv_caches` come in the same order.
    """

    vocab_size: int
    max_position: int
    dtype: torch.dtype
    device: torch.device
    kv_cache_specs: tuple[KVCacheSpec, ...]

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, kv_caches: list[KVCache]
    ) -> torch.Tensor:
        """Write the new tokens' KV and return `[num_tokens, hidden_size]`, ready for `compute_logits`.

        Args:
            input_ids: `[num_tokens]` int64.
            positions: `[num_tokens]` int64, absolute.
        """
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, hidden_size]` to float32 logits `[n, vocab_size]`."""
        ...
