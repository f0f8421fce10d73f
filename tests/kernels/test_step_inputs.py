from __future__ import annotations

import itertools

import pytest
import torch
from step_scripts import (
    BLOCK_SIZE,
    LAYOUT,
    MAX_ROWS,
    NUM_STATE_ROWS,
    BothBatches,
    assert_inputs,
    empty_inputs,
    random_steps,
)

from octavo.kernels.step_inputs import append_tokens, apply_diff, gather_step
from octavo.kernels.step_layout import PIECE_WORDS, RowInputs, StepLayout, TokenInputs


@pytest.mark.parametrize("seed", range(6))
def test_a_step_from_the_devices_batch_is_that_from_the_cpus(seed: int) -> None:
    both = BothBatches()
    state = torch.randint(-5, 1000, (NUM_STATE_ROWS, LAYOUT.row_words), dtype=torch.int32)
    num_padded = 0
    for step in random_steps(seed, 60):
        words, packed, expected = both.take(step)
        if packed.num_pieces:
            apply_diff(state, words, LAYOUT)
        if expected is None:
            continue
        num_rows = MAX_ROWS if packed.is_decode else packed.num_rows
        num_padded += num_rows > packed.num_rows
        rows, tokens = empty_inputs(num_rows if packed.is_decode else packed.num_tokens)
        gather_step(state, words, rows, tokens, num_rows, packed.max_query_len, LAYOUT)
        assert_inputs(rows, tokens, words, packed, expected)
        assert (packed.max_query_len, packed.max_context_len, packed.num_decodes) == (
            expected.arrays.max_query_len,
            expected.arrays.max_context_len,
            expected.arrays.num_decodes,
        )
        append_tokens(state, words, torch.tensor(expected.token_ids, dtype=torch.int64), LAYOUT)
    assert num_padded > 3


def test_a_row_without_a_token_reads_token_zero() -> None:
    state = torch.full((1, LAYOUT.row_words), -1, dtype=torch.int32)
    state[0, LAYOUT.blocks] = 3
    words = torch.zeros(LAYOUT.diff, dtype=torch.int32)
    words[LAYOUT.query_start + 1 : LAYOUT.context_lens] = 1
    words[LAYOUT.context_lens] = 1
    words[LAYOUT.sample_rows : LAYOUT.sample_columns] = -1
    rows, tokens = empty_inputs(1)
    gather_step(state, words, rows, tokens, 1, 1, LAYOUT)
    assert tokens.input_ids.tolist() == [0]
    assert tokens.slot_mapping.tolist() == [3 * BLOCK_SIZE]


def test_tokens_of_padding_go_nowhere() -> None:
    state = torch.zeros((2, LAYOUT.row_words), dtype=torch.int32)
    words = torch.zeros(LAYOUT.diff, dtype=torch.int32)
    words[LAYOUT.sample_rows : LAYOUT.sample_rows + 3] = torch.tensor([1, -1, -1])
    words[LAYOUT.sample_columns : LAYOUT.sample_columns + 3] = torch.tensor([4, 0, 5])
    append_tokens(state, words, torch.tensor([77, 88, 99]), LAYOUT)
    assert state.nonzero().tolist() == [[1, LAYOUT.token_ids + 4]]
    assert state[1, LAYOUT.token_ids + 4] == 77


@pytest.mark.parametrize("max_rows", [1, 15, 16, 17, 256])
@pytest.mark.parametrize("max_model_len", [1, 16, 4097])
def test_sections_and_columns_hold_what_they_must_and_are_aligned(max_rows: int, max_model_len: int) -> None:
    layout = StepLayout(max_rows, max_model_len, 16)
    edges = [
        *(layout.rows, layout.starts, layout.query_start, layout.context_lens),
        *(layout.sample_rows, layout.sample_columns, layout.sample_tokens, layout.num_pieces),
    ]
    sizes = [end - begin for begin, end in itertools.pairwise(edges)]
    assert min(sizes) >= max_rows
    assert layout.context_lens - layout.query_start >= max_rows + 1
    assert all(edge % 16 == 0 for edge in (*edges, layout.diff))
    assert layout.diff > layout.num_pieces
    assert layout.token_ids - layout.blocks >= -(-max_model_len // 16)
    assert layout.row_words - layout.token_ids >= max_model_len + 1  # the last token sampled is never computed
    assert layout.row_words % 16 == 0


def test_inputs_have_room_for_every_row_and_the_padding_of_its_graph() -> None:
    layout = StepLayout(20, 100, 16)
    rows = RowInputs.empty(layout, torch.device("cpu"))
    assert rows.block_tables.shape == (32, 7)
    assert rows.seeds.shape == (32,)
    assert [len(tensor) for tensor in (TokenInputs.empty(5, torch.device("cpu")).first(3).input_ids,)] == [3]
    assert PIECE_WORDS == 1024
