"""What a GPU reaches at its best: what every other figure is a share of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates.

    Attributes:
        read_bytes_per_s: of a stream that is only read.
        flops: of a large matrix product in bfloat16, random data.
        source: where the figures are from.
    """

    read_bytes_per_s: float
    flops: float
    source: str = ""


H200_NOTED = Ceilings(
    read_bytes_per_s=4.3e12,
    flops=790e12,
    source="one H200, noted before: device copy counting reads and writes, bf16 product of 8192 cubed on random data",
)
"""For tables where nothing was measured; `octavo bench gpu` measures its own first."""
