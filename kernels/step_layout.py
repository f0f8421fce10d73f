"""Where what lies in a packed step, in a row of the standing batch, and in the model's inputs that come of both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

PIECE_WORDS = 1024
"""Most words that one piece of a diff writes."""

PARAM_WORDS = 16
"""Words of a row's sampling parameters: temperature, top_k, top_p, min_p, seed (two), prompt tokens, min_tokens,
penalties (repetition, frequency, presence), edits that hold always, edits that hold below min_tokens, three unused."""

MAX_EDITS = 1024
"""Most tokens whose logits a row's request adds to or excludes; a power of two."""

PIECE_ENTRY_WORDS = 4
"""Words of an entry of the diff's table: row, column, where in the packed step the words lie, how many they are."""

_ALIGN = 16  # words, so that each section begins at a multiple of 64 bytes


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class StepLayout:
    """Where what lies: in a packed step, and in a row of the standing batch's `[num_state_rows, row_words]` int32.

    A packed step, all offsets in words:

        rows            the standing row of each of the step's rows
        starts          position of its first new token
        query_start     as in `AttentionBatch`, one more than there are rows
        context_lens    likewise
        sample_rows     the standing row of each token to be sampled, -1 for none (padding, or nothing due)
        sample_columns  position that its token will have
        sample_tokens   which of the step's tokens it follows
        num_pieces      of the diff, in one word
        diff            a table of pieces (`PIECE_ENTRY_WORDS` each), then their words

    Each section before these two has room for `max_rows`, and one more; behind the true rows it is filled as for rows
    without tokens.

    A row: parameters, block table, token ids, and edits: `MAX_EDITS` token ids, then as many float32, which are added
    to the logits of the first ones.

    Args:
        max_rows: most rows of a step, padding included.
        max_model_len: longest sequence of a request, in tokens.
        block_size: tokens in a KV block.
    """

    max_rows: int
    max_model_len: int
    block_size: int

    @cached_property
    def section(self) -> int:
        return _aligned(self.max_rows + 1)

    @cached_property
    def max_blocks(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @cached_property
    def rows(self) -> int:
        return 0

    @cached_property
    def starts(self) -> int:
        return self.rows + self.section

    @cached_property
    def query_start(self) -> int:
        return self.starts + self.section

    @cached_property
    def context_lens(self) -> int:
        return self.query_start + self.section

    @cached_property
    def sample_rows(self) -> int:
        return self.context_lens + self.section

    @cached_property
    def sample_columns(self) -> int:
        return self.sample_rows + self.section

    @cached_property
    def sample_tokens(self) -> int:
        return self.sample_columns + self.section

    @cached_property
    def num_pieces(self) -> int:
        return self.sample_tokens + self.section

    @cached_property
    def diff(self) -> int:
        return self.num_pieces + _ALIGN

    # Columns of a standing row; the parameters are its first.

    @cached_property
    def blocks(self) -> int:
        return PARAM_WORDS

    @cached_property
    def token_ids(self) -> int:
        return self.blocks + _aligned(self.max_blocks)

    @cached_property
    def edits(self) -> int:
        return _aligned(self.token_ids + self.max_model_len + 1)

    @cached_property
    def row_words(self) -> int:
        return self.edits + 2 * MAX_EDITS


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What a step's rows bring to the model and to the sampler, at fixed addresses; all `[max_rows]` but the first.

    Attributes:
        block_tables: `[max_rows, max_blocks]` int32; behind a row's blocks lies what was there before.
        temperature, top_p, min_p: float32, of the tokens to be sampled.
        top_k: int32.
        seeds: int64.
        draw_positions: int64, the number of output tokens before this one.
    """

    block_tables: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    draw_positions: torch.Tensor

    @classmethod
    def empty(cls, layout: StepLayout, device: torch.device) -> RowInputs:
        rows = layout.section

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros((rows, *shape), dtype=dtype, device=device)

        return cls(
            block_tables=zeros(torch.int32, layout.max_blocks),
            temperature=zeros(torch.float32),
            top_k=zeros(torch.int32),
            top_p=zeros(torch.float32),
            min_p=zeros(torch.float32),
            seeds=zeros(torch.int64),
            draw_positions=zeros(torch.int64),
        )


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What a step's tokens bring, each `[num_tokens]` int64: see `CausalLM.forward` and `AttentionBatch`."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> TokenInputs:
        return cls(*(torch.empty(num_tokens, dtype=torch.int64, device=device) for _ in range(3)))

    def first(self, num_tokens: int) -> TokenInputs:
        return TokenInputs(self.input_ids[:num_tokens], self.positions[:num_tokens], self.slot_mapping[:num_tokens])
