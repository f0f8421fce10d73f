"""What attention has to know about one step's ragged batch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One forward pass over `num_rows` requests with `num_tokens` new tokens altogether.

    The rows' new tokens lie behind each other: row i owns tokens `query_start[i] : query_start[i + 1]`, whose absolute
    positions are `context_lens[i] - num_new ... context_lens[i] - 1`. All tensors are on the model's device.

    Attributes:
        query_start: `[num_rows + 1]` int32.
        context_lens: `[num_rows]` int32, tokens of the row in the cache once this step's are written (>= 1).
        block_tables: `[num_rows, max_num_blocks]` int32, padded with 0 behind the row's blocks.
        slot_mapping: `[num_tokens]` int64, `block_id * block_size + offset` where each new token's KV is written.
        block_size: tokens in a block.
        max_query_len: most new tokens of a row (1: pure decode).
        max_context_len: longest context of a row.
        num_decodes: the leading rows with exactly one new token (rows are ordered so: decodes first).
        max_rows: most rows of any batch that will come, 0 if nobody knows: kernels are compiled for so many.
        plans: of kernels, what one layer found out about this batch, for the other layers of its kind.
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    max_query_len: int
    max_context_len: int
    num_decodes: int
    max_rows: int = 0
    plans: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        return self.context_lens.shape[0]
