"""From token ids to vectors."""

from __future__ import annotations

import torch


def embed_ref(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `embed` means."""
    known = (ids >= 0) & (ids < weight.shape[0])
    if weight.shape[0] == 0:
        return torch.zeros((len(ids), weight.shape[1]), dtype=weight.dtype, device=weight.device)
    rows = weight[torch.where(known, ids, 0).long()]
    return rows.masked_fill_(~known.unsqueeze(1), 0.0)


def embed(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Look up each token's vector.

    Args:
        ids: `[num_tokens]` int32 or int64; an id outside the vocabulary, as padding has, gives zeros.
        weight: `[vocab_size, hidden_size]`, the elements of a row next to each other.

    Returns:
        `[num_tokens, hidden_size]`, new, in the dtype of `weight`.

    Raises:
        ValueError: `ids` is not 1-D or `weight` not 2-D.
    """
    if ids.dim() != 1 or weight.dim() != 2:
        raise ValueError(f"ids must be 1-D and weight 2-D, got {tuple(ids.shape)} and {tuple(weight.shape)}")
    if weight.device.type == "cuda" and weight.stride(1) == 1 and weight.dtype.is_floating_point:
        from .gpu import embedding as gpu

        return gpu.embed(ids, weight)
    return embed_ref(ids, weight)
