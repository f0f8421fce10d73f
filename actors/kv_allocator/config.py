"""Configuration of the KV allocator."""

from __future__ import annotations

import msgspec

from ...messages.ids import Epoch

FIRST_EPOCH = Epoch(0)

MAX_BLOCK_SIZE = 256


class AllocatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How much KV there is and whether equal prefixes share it.

    Attributes:
        num_blocks: KV blocks of the executor, >= 1.
        block_size: tokens in a block, 1 to 256.
        enable_prefix_caching: keep full blocks findable; without it only `fork_of` shares.
    """

    num_blocks: int
    block_size: int
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks} must be at least 1: give the KV cache more memory")
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size={self.block_size} must be between 1 and {MAX_BLOCK_SIZE}")
