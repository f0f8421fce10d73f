from __future__ import annotations

import pytest

from octavo.actors.executor.gpu.sampling_plan import TOP_LOGPROBS
from octavo.actors.executor.gpu.warm_up import warm_up_steps
from octavo.messages.step import ExecuteStep


def steps(**fields: int) -> list[ExecuteStep]:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 100, "max_model_len": 64, "block_size": 4, "num_blocks": 100}
    return list(warm_up_steps(**{**sizes, **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 1},
        {"num_blocks": 1},
        {"max_model_len": 1, "block_size": 256},
        {"max_model_len": 100_000, "max_num_batched_tokens": 8192, "num_blocks": 10_000, "block_size": 16},
    ],
    ids=str,
)
def test_no_step_is_larger_than_what_was_asked_for(fields: dict[str, int]) -> None:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 100, "max_model_len": 64, "block_size": 4, "num_blocks": 100}
    sizes |= fields
    planned = steps(**fields)
    assert planned[-1].request_ids == ()  # as the capture of graphs wants it
    standing: set[int] = set()
    for step in planned:
        standing -= set(step.drop)
        standing |= {start.request_id for start in step.start}
        assert len(standing) <= sizes["max_num_seqs"]
        assert sum(step.num_tokens) <= sizes["max_num_batched_tokens"]
        for start, count, (_, blocks) in zip(step.start, step.num_tokens, step.append_blocks, strict=True):
            length = len(start.token_ids) // 4
            assert start.num_computed_tokens + count == length <= sizes["max_model_len"]
            assert len(blocks) == -(-length // sizes["block_size"])
            assert max(blocks) < sizes["num_blocks"]
    assert standing == set()


def test_prompts_of_every_length_short_chunks_of_long_ones_and_every_way_to_sample_occur() -> None:
    planned = [step for step in steps() if step.request_ids]
    alone = [sum(step.num_tokens) for step in planned if all(start.num_computed_tokens == 0 for start in step.start)]
    assert alone[:8] == [1, 2, 4, 8, 16, 32, 64, 100]
    late = [step for step in planned if any(start.num_computed_tokens for start in step.start)]
    assert [step.num_tokens for step in late] == [(1, count) for count in (1, 2, 4, 8, 16, 32, 64)]
    asked = {start.params.logprobs for step in planned for start in step.start}
    assert asked >= set(TOP_LOGPROBS)
    assert any(start.params.top_p < 1.0 for step in planned for start in step.start)


def test_every_number_of_rows_is_sampled_beside_a_chunk() -> None:
    """A step of decodes alone is a graph, and tells nothing of one that is not."""
    planned = steps(max_num_seqs=64, max_num_batched_tokens=65)
    mixed = {len(step.request_ids) for step in planned if step.num_tokens and max(step.num_tokens) == 2}
    assert mixed >= {1, 2, 4, 8, 16, 32, 64}
