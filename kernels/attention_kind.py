"""What tells the attention of one layer from that of another."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionKind:
    """How queries weigh keys; made once for a layer.

    Attributes:
        scale: factor on the dot products, > 0.
        sliding_window: w > 0 lets the query at position p see keys `p - w < j <= p`; 0 sees all.
        softcap: c > 0 replaces each scaled logit s by `c * tanh(s / c)`.
        sinks: `[num_heads]`, for each head one extra logit in the softmax's denominator, with no value.
        alibi_slopes: `[num_heads]`, adds `slope * (j - p)` to the logit of key j.
    """

    scale: float
    sliding_window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
