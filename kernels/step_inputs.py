"""A step's inputs from the batch that stays on the device: the diff applied, tokens and block tables gathered.

One packed tensor of int32 words brings all that the host knows of a step (`StepLayout` says what lies where). Two
kernels turn it into the model's inputs, and a third puts the sampled tokens where the next step will find them, so that
the host can prepare a step without having seen the tokens of the one before.
"""

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
        diff            a table of pieces (`PIECE_ENTRY_WORDS` each), then their words

    Each section has room for `max_rows`; behind the true rows it is filled as for rows without tokens.

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
        return _aligned(self.max_rows)

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
        return self.query_start + _aligned(self.max_rows + 1)

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
    def diff(self) -> int:
        return self.sample_tokens + self.section

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


def apply_diff_ref(state: torch.Tensor, packed: torch.Tensor, num_pieces: int, layout: StepLayout) -> None:
    """What `apply_diff` means."""
    table = packed[layout.diff : layout.diff + num_pieces * PIECE_ENTRY_WORDS].view(num_pieces, PIECE_ENTRY_WORDS)
    for row, column, source, length in table.tolist():
        state[row, column : column + length] = packed[source : source + length]


def gather_step_ref(  # noqa: PLR0917 - as gather_step
    state: torch.Tensor, packed: torch.Tensor, rows: RowInputs, tokens: TokenInputs, num_rows: int, layout: StepLayout
) -> None:
    """What `gather_step` means."""
    standing = packed[layout.rows :][:num_rows].long()
    starts = packed[layout.starts :][:num_rows].long()
    query_start = packed[layout.query_start :][: num_rows + 1].long()
    context_lens = packed[layout.context_lens :][:num_rows]
    # Tokens; those of rows without a context and those behind the last row's are padding.
    num_new = query_start.diff()
    row_of = torch.repeat_interleave(torch.arange(num_rows, device=packed.device), num_new)
    positions = starts[row_of] + torch.arange(len(row_of), device=packed.device) - query_start[row_of]
    tokens.input_ids.zero_()
    tokens.positions.zero_()
    tokens.slot_mapping.fill_(-1)
    of = standing[row_of]
    block_ids = state[of, layout.blocks + positions // layout.block_size].long()
    is_real = context_lens[row_of] > 0
    tokens.input_ids[: len(of)] = torch.where(is_real, state[of, layout.token_ids + positions].clamp_(min=0), 0)
    tokens.positions[: len(of)] = positions
    slots = block_ids * layout.block_size + positions % layout.block_size
    tokens.slot_mapping[: len(of)] = torch.where(is_real, slots, -1)
    # Block tables, as far as they are used.
    table = state[standing, layout.blocks : layout.blocks + layout.max_blocks]
    columns = torch.arange(layout.max_blocks, device=packed.device)
    used = columns * layout.block_size < context_lens.unsqueeze(1)
    rows.block_tables[:num_rows] = torch.where(used, table, rows.block_tables[:num_rows])
    # Sampling parameters; a row that samples nothing is greedy.
    sampled = packed[layout.sample_rows :][:num_rows].long()
    params = torch.where(sampled.unsqueeze(1) >= 0, state[sampled.clamp(min=0), :PARAM_WORDS], 0).contiguous()
    floats = params.view(torch.float32)
    rows.temperature[:num_rows] = floats[:, 0]
    rows.top_k[:num_rows] = params[:, 1]
    rows.top_p[:num_rows] = floats[:, 2]
    rows.min_p[:num_rows] = floats[:, 3]
    rows.seeds[:num_rows] = params.view(torch.int64)[:, 2]
    columns = packed[layout.sample_columns :][:num_rows]
    rows.draw_positions[:num_rows] = torch.where(sampled >= 0, columns - params[:, 6], 0)


def append_tokens_ref(state: torch.Tensor, packed: torch.Tensor, token_ids: torch.Tensor, layout: StepLayout) -> None:
    """What `append_tokens` means."""
    sampled = packed[layout.sample_rows :][: len(token_ids)].long()
    columns = packed[layout.sample_columns :][: len(token_ids)].long()
    keep = sampled >= 0
    state[sampled[keep], layout.token_ids + columns[keep]] = token_ids[keep].to(torch.int32)


def apply_diff(state: torch.Tensor, packed: torch.Tensor, num_pieces: int, layout: StepLayout) -> None:
    """Write the diff's pieces into the standing batch. No two pieces overlap.

    Args:
        state: `[num_state_rows, layout.row_words]` int32, contiguous, changed in place.
        packed: a packed step, int32.
        num_pieces: entries of its table, >= 1; each writes at most `PIECE_WORDS`.
    """
    if packed.device.type == "cuda":
        from .gpu import step_inputs

        step_inputs.apply_diff(state, packed, num_pieces, layout)
    else:
        apply_diff_ref(state, packed, num_pieces, layout)


def gather_step(  # noqa: PLR0917 - state, step, outputs: as in apply_diff and append_tokens
    state: torch.Tensor,
    packed: torch.Tensor,
    rows: RowInputs,
    tokens: TokenInputs,
    num_rows: int,
    max_query_len: int,
    layout: StepLayout,
) -> None:
    """Arrange a step's inputs; as `StandingBatch.gather`, from a diff that was applied before.

    A token id below 0 (of a row from which none could be sampled) is read as 0.

    Args:
        state, packed: as for `apply_diff`.
        rows: their first `num_rows` are written.
        tokens: written to the end; for those of rows without a context, which start at 0, and behind the last row's id
            0, position 0 (and on), slot -1.
        num_rows: rows to write, padding included.
        max_query_len: most new tokens of a row.
    """
    if packed.device.type == "cuda":
        from .gpu import step_inputs

        step_inputs.gather_step(state, packed, rows, tokens, num_rows, max_query_len, layout)
    else:
        gather_step_ref(state, packed, rows, tokens, num_rows, layout)


def append_tokens(state: torch.Tensor, packed: torch.Tensor, token_ids: torch.Tensor, layout: StepLayout) -> None:
    """Put sampled tokens behind their rows' last.

    Args:
        state, packed: as for `apply_diff`.
        token_ids: `[num_samples]` int64, in the order of `sample_rows`; those of row -1 go nowhere.
    """
    if packed.device.type == "cuda":
        from .gpu import step_inputs

        step_inputs.append_tokens(state, packed, token_ids, layout)
    else:
        append_tokens_ref(state, packed, token_ids, layout)
