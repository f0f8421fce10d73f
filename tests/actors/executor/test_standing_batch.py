from __future__ import annotations

import numpy as np
import pytest

from octavo.actors.executor.standing_batch import StandingBatch
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest

A, B, C = RequestId(10), RequestId(11), RequestId(12)


def tokens(*ids: int) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


def blocks(*ids: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block_id) for block_id in ids)


def step(rows: dict[RequestId, int], **changes: object) -> ExecuteStep:
    return ExecuteStep(Epoch(0), StepId(0), tuple(rows), tuple(rows.values()), **changes)  # type: ignore[arg-type]


def start(request_id: RequestId, *ids: int, computed: int = 0) -> StartRequest:
    return StartRequest(request_id, tokens(*ids), len(ids), computed, SamplingParams())


@pytest.fixture
def batch() -> StandingBatch:
    return StandingBatch(max_num_rows=4, max_model_len=32, block_size=4)


def test_a_chunked_prompt_samples_only_when_its_last_token_is_computed(batch: StandingBatch) -> None:
    first = step({A: 3}, start=(start(A, 1, 2, 3, 4, 5),), block_tables=((),), append_blocks=((A, blocks(7, 2)),))
    batch.apply(first)
    arrays = batch.gather(first)
    assert arrays.input_ids.tolist() == [1, 2, 3]
    assert arrays.positions.tolist() == [0, 1, 2]
    assert arrays.slot_mapping.tolist() == [28, 29, 30]
    assert arrays.sampling_requests == ()
    arrays = batch.gather(step({A: 2}))
    assert arrays.input_ids.tolist() == [4, 5]
    assert arrays.slot_mapping.tolist() == [31, 8]
    assert arrays.sampling_requests == (A,)
    assert arrays.sampling_tokens.tolist() == [1]
    assert arrays.context_lens.tolist() == [5]


def test_a_sampled_token_is_the_input_of_the_next_step(batch: StandingBatch) -> None:
    first = step({A: 2}, start=(start(A, 1, 2),), block_tables=((),), append_blocks=((A, blocks(0)),))
    batch.apply(first)
    batch.gather(first)
    batch.append((A,), (99,))
    arrays = batch.gather(step({A: 1}))
    assert arrays.input_ids.tolist() == [99]
    assert arrays.positions.tolist() == [2]
    assert arrays.sampling_requests == (A,)
    assert batch.token_ids(A) == [1, 2, 99]


def test_cached_blocks_are_the_head_of_the_block_table(batch: StandingBatch) -> None:
    first = step(
        {A: 2}, start=(start(A, *range(6), computed=4),), block_tables=(blocks(3),), append_blocks=((A, blocks(5)),)
    )
    batch.apply(first)
    arrays = batch.gather(first)
    assert arrays.input_ids.tolist() == [4, 5]
    assert arrays.slot_mapping.tolist() == [20, 21]
    assert arrays.block_tables.tolist() == [[3, 5]]


def test_rows_of_different_lengths_lie_behind_each_other(batch: StandingBatch) -> None:
    batch.apply(step({}, start=(start(A, 1),), block_tables=((),), append_blocks=((A, blocks(1)),)))
    batch.gather(step({A: 1}))
    batch.append((A,), (50,))
    mixed = step(
        {A: 1, B: 3, C: 2},
        start=(start(B, 4, 5, 6), start(C, 7, 8, 9)),
        block_tables=((), ()),
        append_blocks=((B, blocks(2)), (C, blocks(3))),
    )
    batch.apply(mixed)
    arrays = batch.gather(mixed)
    assert arrays.input_ids.tolist() == [50, 4, 5, 6, 7, 8]
    assert arrays.query_start.tolist() == [0, 1, 4, 6]
    assert arrays.num_decodes == 1
    assert arrays.max_query_len == 3
    assert arrays.sampling_requests == (A, B)
    assert arrays.sampling_tokens.tolist() == [0, 3]


def test_a_dropped_row_is_used_again_without_a_trace(batch: StandingBatch) -> None:
    for round_number in range(12):
        request_id = RequestId(round_number)
        prompt = [round_number + 1] * (round_number % 3 + 1)
        begin = step(
            {request_id: len(prompt)},
            start=(start(request_id, *prompt),),
            block_tables=((),),
            append_blocks=((request_id, blocks(round_number)),),
        )
        batch.apply(begin)
        arrays = batch.gather(begin)
        assert arrays.input_ids.tolist() == prompt
        assert arrays.slot_mapping.tolist() == [round_number * 4 + i for i in range(len(prompt))]
        batch.append((request_id,), (7,))
        batch.apply(step({}, drop=(request_id,)))
        assert len(batch) == 0
