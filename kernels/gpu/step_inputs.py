"""Triton kernels of `octavo.kernels.step_inputs`, where it stands what they mean; `step_layout` says where what lies.

Every number that changes from step to step is read from the packed step on the device, so that no step compiles anew
and a captured graph serves any step of its size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..step_layout import PARAM_WORDS, PIECE_ENTRY_WORDS, PIECE_WORDS, RowInputs, StepLayout, TokenInputs
from .launch import is_interpreted

_DIFF_PROGRAMS = 128  # which take pieces in turn: mostly there are fewer, and never is it known before
_GATHER_BLOCK = 256
_APPEND_BLOCK = 128


@triton.jit
def _apply_diff_kernel(
    state_ptr,  # [num_state_rows, ROW_WORDS] int32
    packed_ptr,  # int32
    ROW_WORDS: tl.constexpr,
    NUM_PIECES: tl.constexpr,  # offset of their number
    DIFF: tl.constexpr,  # offset of their table
    ENTRY_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,  # most words of a piece
):
    word = tl.arange(0, BLOCK)
    for piece in range(tl.program_id(0), tl.load(packed_ptr + NUM_PIECES), tl.num_programs(0)):
        entry = packed_ptr + DIFF + piece * ENTRY_WORDS
        row = tl.load(entry).to(tl.int64)
        column = tl.load(entry + 1)
        source = tl.load(entry + 2)
        length = tl.load(entry + 3)
        mask = word < length
        words = tl.load(packed_ptr + source + word, mask=mask, other=0)
        tl.store(state_ptr + row * ROW_WORDS + column + word, words, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_step_kernel(
    state_ptr,  # [num_state_rows, ROW_WORDS] int32
    packed_ptr,  # int32
    input_ids_ptr,  # [num_tokens] int64, as are the next two
    positions_ptr,
    slot_mapping_ptr,
    block_tables_ptr,  # [num_rows, MAX_BLOCKS] int32
    temperature_ptr,  # [num_rows] float32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] float32
    min_p_ptr,  # [num_rows] float32
    seeds_ptr,  # [num_rows] int64
    draw_positions_ptr,  # [num_rows] int64
    num_tokens,
    ROW_WORDS: tl.constexpr,
    ROWS: tl.constexpr,  # offsets in the packed step, as the next five
    STARTS: tl.constexpr,
    QUERY_START: tl.constexpr,
    CONTEXT_LENS: tl.constexpr,
    SAMPLE_ROWS: tl.constexpr,
    SAMPLE_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,  # offsets in a standing row, as the next
    TOKEN_IDS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    standing_ptr = state_ptr + tl.load(packed_ptr + ROWS + row).to(tl.int64) * ROW_WORDS
    # New tokens.
    begin = tl.load(packed_ptr + QUERY_START + row)
    num_new = tl.load(packed_ptr + QUERY_START + row + 1) - begin
    context_len = tl.load(packed_ptr + CONTEXT_LENS + row)
    position = tl.load(packed_ptr + STARTS + row) + column
    is_new = column < num_new
    is_real = is_new & (context_len > 0)  # else a padding row's, which is nobody's
    token_id = tl.load(standing_ptr + TOKEN_IDS + position, mask=is_real, other=0)
    block_id = tl.load(standing_ptr + BLOCKS + position // BLOCK_SIZE, mask=is_real, other=0)
    slot = tl.where(is_real, block_id.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(input_ids_ptr + begin + column, tl.maximum(token_id, 0).to(tl.int64), mask=is_new)
    tl.store(positions_ptr + begin + column, position.to(tl.int64), mask=is_new)
    tl.store(slot_mapping_ptr + begin + column, slot, mask=is_new)
    # Padding behind the last row's tokens, of which each program takes a part.
    part = row * tl.num_programs(1) + tl.program_id(1)
    behind = tl.load(packed_ptr + QUERY_START + tl.num_programs(0)) + part * BLOCK + tl.arange(0, BLOCK)
    is_behind = behind < num_tokens
    tl.store(input_ids_ptr + behind, tl.zeros([BLOCK], tl.int64), mask=is_behind)
    tl.store(positions_ptr + behind, tl.zeros([BLOCK], tl.int64), mask=is_behind)
    tl.store(slot_mapping_ptr + behind, tl.zeros([BLOCK], tl.int64) - 1, mask=is_behind)
    # The block table, as far as it is used.
    is_used = (column * BLOCK_SIZE < context_len) & (column < MAX_BLOCKS)
    block_ids = tl.load(standing_ptr + BLOCKS + column, mask=is_used, other=0)
    tl.store(block_tables_ptr + row.to(tl.int64) * MAX_BLOCKS + column, block_ids, mask=is_used)
    if tl.program_id(1) == 0:
        sampled = tl.load(packed_ptr + SAMPLE_ROWS + row)
        samples = sampled >= 0
        param_ptr = state_ptr + tl.maximum(sampled, 0).to(tl.int64) * ROW_WORDS
        temperature = tl.load(param_ptr, mask=samples, other=0).to(tl.float32, bitcast=True)
        top_p = tl.load(param_ptr + 2, mask=samples, other=0).to(tl.float32, bitcast=True)
        min_p = tl.load(param_ptr + 3, mask=samples, other=0).to(tl.float32, bitcast=True)
        low = tl.load(param_ptr + 4, mask=samples, other=0).to(tl.int64) & 0xFFFFFFFF
        high = tl.load(param_ptr + 5, mask=samples, other=0).to(tl.int64)
        num_prompt_tokens = tl.load(param_ptr + 6, mask=samples, other=0)
        draw_position = tl.load(packed_ptr + SAMPLE_COLUMNS + row, mask=samples, other=0) - num_prompt_tokens
        tl.store(temperature_ptr + row, temperature)
        tl.store(top_k_ptr + row, tl.load(param_ptr + 1, mask=samples, other=0))
        tl.store(top_p_ptr + row, top_p)
        tl.store(min_p_ptr + row, min_p)
        tl.store(seeds_ptr + row, (high << 32) | low)
        tl.store(draw_positions_ptr + row, draw_position.to(tl.int64))


@triton.jit(do_not_specialize=["num_samples"])
def _append_tokens_kernel(
    state_ptr,  # [num_state_rows, ROW_WORDS] int32
    packed_ptr,  # int32
    token_ids_ptr,  # [num_samples] int64
    num_samples,
    ROW_WORDS: tl.constexpr,
    SAMPLE_ROWS: tl.constexpr,
    SAMPLE_COLUMNS: tl.constexpr,
    TOKEN_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = sample < num_samples
    row = tl.load(packed_ptr + SAMPLE_ROWS + sample, mask=mask, other=-1)
    column = tl.load(packed_ptr + SAMPLE_COLUMNS + sample, mask=mask, other=0)
    token_id = tl.load(token_ids_ptr + sample, mask=mask, other=0).to(tl.int32)
    tl.store(state_ptr + row.to(tl.int64) * ROW_WORDS + TOKEN_IDS + column, token_id, mask=mask & (row >= 0))


def apply_diff(state: torch.Tensor, packed: torch.Tensor, layout: StepLayout) -> None:
    """See `octavo.kernels.step_inputs.apply_diff`."""
    _apply_diff_kernel[(3 if is_interpreted() else _DIFF_PROGRAMS,)](
        state,
        packed,
        ROW_WORDS=layout.row_words,
        NUM_PIECES=layout.num_pieces,
        DIFF=layout.diff,
        ENTRY_WORDS=PIECE_ENTRY_WORDS,
        BLOCK=PIECE_WORDS,
    )


def gather_step(  # noqa: PLR0917,RUF100 - as its meaning's
    state: torch.Tensor,
    packed: torch.Tensor,
    rows: RowInputs,
    tokens: TokenInputs,
    num_rows: int,
    max_query_len: int,
    layout: StepLayout,
) -> None:
    """See `octavo.kernels.step_inputs.gather_step`."""
    num_columns = max(max_query_len, layout.max_blocks)
    _gather_step_kernel[(num_rows, triton.cdiv(num_columns, _GATHER_BLOCK))](
        state,
        packed,
        tokens.input_ids,
        tokens.positions,
        tokens.slot_mapping,
        rows.block_tables,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.seeds,
        rows.draw_positions,
        tokens.input_ids.shape[0],
        ROW_WORDS=layout.row_words,
        ROWS=layout.rows,
        STARTS=layout.starts,
        QUERY_START=layout.query_start,
        CONTEXT_LENS=layout.context_lens,
        SAMPLE_ROWS=layout.sample_rows,
        SAMPLE_COLUMNS=layout.sample_columns,
        BLOCKS=layout.blocks,
        TOKEN_IDS=layout.token_ids,
        MAX_BLOCKS=layout.max_blocks,
        BLOCK_SIZE=layout.block_size,
        BLOCK=_GATHER_BLOCK,
    )


def append_tokens(state: torch.Tensor, packed: torch.Tensor, token_ids: torch.Tensor, layout: StepLayout) -> None:
    """See `octavo.kernels.step_inputs.append_tokens`."""
    num_samples = token_ids.shape[0]
    _append_tokens_kernel[(triton.cdiv(num_samples, _APPEND_BLOCK),)](
        state,
        packed,
        token_ids,
        num_samples,
        ROW_WORDS=layout.row_words,
        SAMPLE_ROWS=layout.sample_rows,
        SAMPLE_COLUMNS=layout.sample_columns,
        TOKEN_IDS=layout.token_ids,
        BLOCK=_APPEND_BLOCK,
    )


assert PARAM_WORDS >= 7  # words that the gather reads of them
