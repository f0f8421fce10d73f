from __future__ import annotations

import pytest
import torch
from step_scripts import (
    BLOCK_SIZE,
    LAYOUT,
    MAX_ROWS,
    MIXED_SIZES,
    NUM_STATE_ROWS,
    PADDED_LAYOUT,
    VOCAB_SIZE,
    BothBatches,
    assert_inputs,
    empty_inputs,
    random_steps,
)

from octavo.actors.executor.gpu.device_batch import DeviceBatch
from octavo.actors.executor.gpu.step_diff import StepDiff
from octavo.actors.executor.sampler import Sampler
from octavo.kernels import step_inputs as meaning
from octavo.kernels.gpu import step_inputs as gpu
from octavo.kernels.step_layout import RowInputs, StepLayout, TokenInputs
from octavo.messages.step import ExecuteStep

ROW_FIELDS = ("block_tables", "temperature", "top_k", "top_p", "min_p", "seeds", "draw_positions")


@pytest.mark.parametrize("seed", range(2))
def test_the_kernels_do_what_they_mean(seed: int) -> None:
    both = BothBatches()
    ours = torch.randint(-5, 1000, (NUM_STATE_ROWS, LAYOUT.row_words), dtype=torch.int32)
    theirs = ours.clone()
    for step in random_steps(seed, 25):
        words, packed, expected = both.take(step)
        if packed.num_pieces:
            gpu.apply_diff(ours, words, LAYOUT)
            meaning.apply_diff_ref(theirs, words, LAYOUT)
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


@pytest.mark.parametrize("gather", ["kernel", "meaning"])
def test_padding_among_the_rows_is_nobodys(gather: str) -> None:
    """A step as it is, and laid out for a size: the true tokens are the same, and the others go nowhere."""
    plain, padded = (DeviceBatch(PADDED_LAYOUT, NUM_STATE_ROWS, sizes) for sizes in (None, MIXED_SIZES))
    state = torch.randint(0, 1000, (NUM_STATE_ROWS, PADDED_LAYOUT.row_words), dtype=torch.int32)
    num_padded = 0
    for step in random_steps(3, 20):
        packs = []
        for batch in (plain, padded):
            take_in(batch, step)
            words = torch.full((PADDED_LAYOUT.diff + 1000,), -7, dtype=torch.int32)
            packs.append((words, batch.pack(step, StepDiff(PADDED_LAYOUT), words.numpy())))
        (words, packed), (words_padded, packed_padded) = packs
        size = packed_padded.padded_to
        if size is None:
            continue
        num_padded += 1
        device = torch.device("cpu")
        rows, tokens = RowInputs.empty(PADDED_LAYOUT, device), TokenInputs.empty(packed.num_tokens, device)
        meaning.gather_step_ref(state, words, rows, tokens, packed.num_rows, PADDED_LAYOUT)
        rows_padded, tokens_padded = RowInputs.empty(PADDED_LAYOUT, device), TokenInputs.empty(size.num_tokens, device)
        if gather == "kernel":
            gpu.gather_step(
                *(state, words_padded, rows_padded, tokens_padded, size.num_rows, size.num_chunk_tokens, PADDED_LAYOUT)
            )
        else:
            meaning.gather_step_ref(state, words_padded, rows_padded, tokens_padded, size.num_rows, PADDED_LAYOUT)
        gap = size.num_decodes - packed.num_decodes
        at = torch.arange(packed.num_tokens)
        at += torch.where(at < packed.num_decodes, 0, gap)
        true = torch.zeros(size.num_tokens, dtype=torch.bool).index_fill_(0, at, True)
        for name, of_padding in (("input_ids", 0), ("positions", 0), ("slot_mapping", -1)):
            found = getattr(tokens_padded, name)
            assert torch.equal(found[at], getattr(tokens, name)), name
            assert set(found[~true].tolist()) <= {of_padding}
        of_rows = torch.arange(packed.num_rows)
        of_rows += torch.where(of_rows < packed.num_decodes, 0, gap)
        used = torch.arange(PADDED_LAYOUT.max_blocks) * BLOCK_SIZE < words[PADDED_LAYOUT.context_lens :][
            : packed.num_rows
        ].unsqueeze(1)
        tables, tables_padded = rows.block_tables[: packed.num_rows], rows_padded.block_tables[of_rows]
        assert torch.equal(tables.where(used, 0), tables_padded.where(used, 0))
        for name in ROW_FIELDS[1:]:  # of samples, which lie one behind the other in both
            assert torch.equal(
                getattr(rows, name)[: len(packed.sampled)], getattr(rows_padded, name)[: len(packed.sampled)]
            ), name
        sampled = words_padded[PADDED_LAYOUT.sample_rows :][: size.num_rows]
        assert set(sampled[len(packed.sampled) :].tolist()) <= {-1}
        sample_tokens = words_padded[PADDED_LAYOUT.sample_tokens :][: size.num_rows]
        expected = words[PADDED_LAYOUT.sample_tokens :][: len(packed.sampled)]
        assert torch.equal(sample_tokens[: len(expected)], at[expected.long()].int())
        assert 0 <= int(sample_tokens.min()) <= int(sample_tokens.max()) < size.num_tokens
    assert num_padded > 10


def take_in(batch: DeviceBatch, step: ExecuteStep) -> None:
    """Drops, starts and blocks."""
    for request_id in step.drop:
        batch.drop(request_id)
    for start, table in zip(step.start, step.block_tables, strict=True):
        sampler = Sampler(VOCAB_SIZE)
        sampler.add(start.request_id, start.params, [1] * (len(start.token_ids) // 4), start.num_prompt_tokens, ())
        batch.start(start, len(table), sampler.state_of(start.request_id))
    for _ in batch.append_blocks(step):
        pass
