"""A step's inputs from the batch that stays on the device: the diff applied, tokens and block tables gathered.

One packed tensor of int32 words brings all that the host knows of a step (`step_layout` says what lies where). Two
kernels turn it into the model's inputs, and a third puts the sampled tokens where the next step will find them, so that
the host can prepare a step without having seen the tokens of the one before.
"""

from __future__ import annotations

import torch

from .step_layout import PARAM_WORDS, PIECE_ENTRY_WORDS, RowInputs, StepLayout, TokenInputs


def apply_diff_ref(state: torch.Tensor, packed: torch.Tensor, layout: StepLayout) -> None:
    """What `apply_diff` means."""
    num_pieces = int(packed[layout.num_pieces])
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


def apply_diff(state: torch.Tensor, packed: torch.Tensor, layout: StepLayout) -> None:
    """Write the diff's pieces into the standing batch. No two pieces overlap.

    Args:
        state: `[num_state_rows, layout.row_words]` int32, contiguous, changed in place.
        packed: a packed step, int32, of any number of pieces; each writes at most `PIECE_WORDS`.
    """
    if packed.device.type == "cuda":
        from .gpu import step_inputs

        step_inputs.apply_diff(state, packed, layout)
    else:
        apply_diff_ref(state, packed, layout)


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
