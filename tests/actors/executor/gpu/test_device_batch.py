from __future__ import annotations

import numpy as np
import pytest
import torch
from step_scripts import (
    LAYOUT,
    NUM_STATE_ROWS,
    VOCAB_SIZE,
    BothBatches,
    assert_inputs,
    empty_inputs,
)

from octavo.actors.executor.gpu.device_batch import DeviceBatch
from octavo.actors.executor.gpu.step_diff import StepDiff
from octavo.actors.executor.sampler import Sampler
from octavo.kernels.step_inputs import append_tokens, apply_diff, gather_step
from octavo.kernels.step_layout import PIECE_ENTRY_WORDS, PIECE_WORDS, StepLayout
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest

A, B, C = RequestId(1), RequestId(2), RequestId(3)
PARAMS = SamplingParams(temperature=0.5, seed=2**63 + 7)


def start(request_id: RequestId, num_tokens: int) -> StartRequest:
    token_ids = np.arange(num_tokens, dtype=np.int32) + 100 * request_id
    return StartRequest(request_id, token_ids.tobytes(), num_tokens, 0, PARAMS)


def step(index: int, rows: dict[RequestId, int], **changes: object) -> ExecuteStep:
    return ExecuteStep(Epoch(0), StepId(index), tuple(rows), tuple(rows.values()), **changes)  # type: ignore[arg-type]


def blocks_for(*request_ids: RequestId) -> tuple[tuple[RequestId, tuple[BlockId, ...]], ...]:
    return tuple(
        (request_id, tuple(BlockId(10 * request_id + index) for index in range(10))) for request_id in request_ids
    )


@pytest.mark.parametrize("num_decodes", [1, 2, 3, 7])
def test_decodes_in_a_row_are_counted_on_and_then_entered(num_decodes: int) -> None:
    """Others come and go between stretches of decodes, and rows rest: each time all counts must be up to date."""
    both = BothBatches()
    state = torch.zeros((NUM_STATE_ROWS, LAYOUT.row_words), dtype=torch.int32)
    script = [{A: 3, B: 5}, *[{A: 1, B: 1}] * num_decodes, {A: 1, B: 1, C: 2}, *[{A: 1, B: 1, C: 1}] * num_decodes]
    script += [{A: 1, C: 1}] * num_decodes + [{A: 1, B: 1, C: 1}] + [{C: 1, A: 1}] * num_decodes
    for index, rows in enumerate(script):
        starts = {0: (A, B), num_decodes + 1: (C,)}.get(index, ())
        drop = (B,) if index == len(script) - num_decodes else ()
        planned = step(
            index,
            rows,
            start=tuple(start(request_id, rows[request_id]) for request_id in starts),
            block_tables=((),) * len(starts),
            append_blocks=blocks_for(*starts),
            drop=drop,
        )
        words, packed, expected = both.take(planned)
        if packed.num_pieces:
            apply_diff(state, words, LAYOUT)
        assert expected is not None
        inputs, tokens = empty_inputs(packed.num_tokens)
        gather_step(state, words, inputs, tokens, packed.num_rows, packed.max_query_len, LAYOUT)
        assert_inputs(inputs, tokens, words, packed, expected)
        assert packed.max_context_len == expected.arrays.max_context_len
        append_tokens(state, words, torch.tensor(expected.token_ids), LAYOUT)


def test_a_request_that_failed_computes_on_and_samples_no_more() -> None:
    both = BothBatches()
    for index, rows in enumerate([{A: 2, B: 2}, {A: 1, B: 1}, {A: 1, B: 1}]):
        starts = (A, B) if index == 0 else ()
        _, packed, _ = both.take(
            step(
                index,
                rows,
                start=tuple(start(request_id, 2) for request_id in starts),
                block_tables=((),) * len(starts),
                append_blocks=blocks_for(*starts),
            )
        )
    failed = packed.sampled[1]
    both.batch.fail(failed)
    diff = StepDiff(LAYOUT)
    words = np.zeros(LAYOUT.diff, dtype=np.int32)
    for _ in range(3):
        packed = both.batch.pack(step(3, {A: 1, B: 1}), diff, words)
        assert [standing.request_id for standing in packed.sampled] == [A]
        assert not packed.is_decode
    both.batch.drop(B)
    both.batch.fail(failed)  # heard of once more, after its end
    packed = both.batch.pack(step(4, {A: 1}), diff, words)
    assert packed.is_decode
    assert [standing.request_id for standing in packed.sampled] == [A]


def test_a_dropped_request_leaves_its_row_to_the_next() -> None:
    batch, sampler = DeviceBatch(LAYOUT, 1), Sampler(VOCAB_SIZE)
    for request_id in (A, B, A):
        sampler.add(request_id, PARAMS, [1, 2], 2, ())
        assert batch.start(start(request_id, 2), 0, sampler.state_of(request_id)).row == 0
        assert request_id in batch
        batch.drop(request_id)
        batch.drop(request_id)
        sampler.remove(request_id)
        assert len(batch) == 0


def test_long_tokens_and_tables_are_cut_into_pieces() -> None:
    layout = StepLayout(2, 3000, 1)
    diff = StepDiff(layout)
    token_ids = np.arange(2500, dtype=np.int32)
    table = tuple(range(5, 1505))
    diff.write_start(1, StartRequest(A, token_ids.tobytes(), 2500, 0, PARAMS), table, seed=-9)
    diff.write_blocks([(1, 1500, tuple(range(7000, 8100))), (0, 3, (42,))])
    words = torch.zeros(diff.packed_words, dtype=torch.int32)
    assert diff.pack(words.numpy()) == len(words)
    lengths = words[layout.diff :][: diff.num_pieces * PIECE_ENTRY_WORDS].view(-1, PIECE_ENTRY_WORDS)[:, 3].tolist()
    assert max(lengths) == PIECE_WORDS
    state = torch.full((2, layout.row_words), -1, dtype=torch.int32)
    apply_diff(state, words, layout)
    assert state[1, layout.token_ids :][:2500].tolist() == token_ids.tolist()
    assert state[1, layout.blocks :][:2600].tolist() == [*table, *range(7000, 8100)]
    assert state[0, layout.blocks + 3] == 42
    assert (state[0] != -1).sum() == 1
    assert state[1, :8].view(torch.int64)[2] == -9
