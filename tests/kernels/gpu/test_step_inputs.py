from __future__ import annotations

import pytest
import torch
from step_scripts import LAYOUT, MAX_ROWS, NUM_STATE_ROWS, BothBatches, assert_inputs, empty_inputs, random_steps

from octavo.kernels import step_inputs as meaning
from octavo.kernels.gpu import step_inputs as gpu
from octavo.kernels.step_inputs import RowInputs, StepLayout, TokenInputs

ROW_FIELDS = ("block_tables", "temperature", "top_k", "top_p", "min_p", "seeds", "draw_positions")


@pytest.mark.parametrize("seed", range(2))
def test_the_kernels_do_what_they_mean(seed: int) -> None:
    both = BothBatches()
    ours = torch.randint(-5, 1000, (NUM_STATE_ROWS, LAYOUT.row_words), dtype=torch.int32)
    theirs = ours.clone()
    for step in random_steps(seed, 25):
        words, packed, expected = both.take(step)
        if packed.num_pieces:
            gpu.apply_diff(ours, words, packed.num_pieces, LAYOUT)
            meaning.apply_diff_ref(theirs, words, packed.num_pieces, LAYOUT)
        assert torch.equal(ours, theirs)
        if expected is None:
            continue
        num_rows = MAX_ROWS if packed.is_decode else packed.num_rows
        num_tokens = num_rows if packed.is_decode else packed.num_tokens
        rows, tokens = empty_inputs(num_tokens)
        gpu.gather_step(ours, words, rows, tokens, num_rows, packed.max_query_len, LAYOUT)
        assert_inputs(rows, tokens, words, packed, expected)
        rows_ref, tokens_ref = empty_inputs(num_tokens)
        meaning.gather_step_ref(theirs, words, rows_ref, tokens_ref, num_rows, LAYOUT)
        for name in ROW_FIELDS:
            assert torch.equal(getattr(rows, name)[:num_rows], getattr(rows_ref, name)[:num_rows]), name
        for name in ("input_ids", "positions", "slot_mapping"):
            assert torch.equal(getattr(tokens, name), getattr(tokens_ref, name)), name
        # As a graph does: for padding too something is sampled.
        token_ids = torch.tensor(expected.token_ids + [5] * (num_rows - len(expected.token_ids)))
        if packed.num_rows != num_rows:
            assert packed.is_decode
        else:
            token_ids = token_ids[: len(expected.token_ids)]
        if len(token_ids):
            gpu.append_tokens(ours, words, token_ids, LAYOUT)
            meaning.append_tokens_ref(theirs, words, token_ids, LAYOUT)
    assert torch.equal(ours, theirs)


def test_long_rows_and_tables_take_several_programs() -> None:
    layout = StepLayout(2, 1100, 2)  # 550 blocks: three programs of 256 columns, the chunk five
    state = torch.randint(0, 1000, (3, layout.row_words), dtype=torch.int32)
    words = torch.zeros(layout.diff, dtype=torch.int32)
    words[layout.rows : layout.rows + 2] = torch.tensor([2, 0])
    words[layout.starts : layout.starts + 2] = torch.tensor([1090, 3])
    words[layout.query_start : layout.query_start + 3] = torch.tensor([0, 1, 1031])
    words[layout.context_lens : layout.context_lens + 2] = torch.tensor([1091, 1033])
    words[layout.sample_rows : layout.sample_rows + 2] = -1
    device = torch.device("cpu")
    both = []
    for gather in (gpu.gather_step, lambda s, p, r, t, n, _, layout: meaning.gather_step_ref(s, p, r, t, n, layout)):
        rows, tokens = RowInputs.empty(layout, device), TokenInputs.empty(1031, device)
        gather(state, words, rows, tokens, 2, 1030, layout)
        both.append((rows, tokens))
    (rows, tokens), (rows_ref, tokens_ref) = both
    assert torch.equal(rows.block_tables, rows_ref.block_tables)
    assert torch.equal(tokens.input_ids, tokens_ref.input_ids)
    assert torch.equal(tokens.positions, tokens_ref.positions)
    assert torch.equal(tokens.slot_mapping, tokens_ref.slot_mapping)
