"""Random weights of 4 and 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from octavo.kernels.quantized_weight import QuantizedWeight

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(
    out_features: int, in_features: int, *, bits: int, group_size: int, factors: str, seed: int = 0, **options: Any
) -> QuantizedWeight:
    """Random codes; `factors` is `symmetric`, `zeros` or `offsets`, or the dtype of symmetric scales."""
    rng = generator(seed)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    scales = torch.randn(out_features, groups, generator=rng).to(DTYPES.get(factors, torch.float16))
    return QuantizedWeight.from_codes(
        torch.randint(low, high, (out_features, in_features), generator=rng),
        scales,
        bits=bits,
        group_size=group_size,
        zeros=torch.randint(low, high, scales.shape, generator=rng).short() if factors == "zeros" else None,
        offsets=torch.randn(scales.shape, generator=rng) if factors == "offsets" else None,
        **options,
    )
