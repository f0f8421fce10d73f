"""Steps of every kind, so that no kernel is left to be compiled when the first request comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ....messages.ids import BlockId, Epoch, RequestId, StepId
from ....messages.sampling import SamplingParams
from ....messages.step import ExecuteStep, StartRequest
from .sampling_plan import TOP_LOGPROBS

_GREEDY = SamplingParams(temperature=0.0)
_WAYS = (
    SamplingParams(temperature=0.7, seed=0),
    SamplingParams(temperature=0.7, seed=0, top_k=20, top_p=0.9, min_p=0.01),
    *(SamplingParams(temperature=0.0, logprobs=count) for count in TOP_LOGPROBS),
)
"""Each is tried in a step of its own, by decodes with a chunk of a prompt and without."""

_LONG_CONTEXT = 8192
"""Attention chooses no other kernel for a longer one."""


def warm_up_steps(
    *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int, num_blocks: int
) -> Iterator[ExecuteStep]:
    """Prompts of 1, 2, 4 ... tokens up to what a step may have; then chunks of such lengths at the end of a long
    context, a decode beside them; then as many rows as there can be, and every way to sample. The last has no rows.

    All share the cache's first blocks, whose contents are of no account: every step is right by itself.
    """
    longest = min(max_model_len, num_blocks * block_size)
    most = min(max_num_batched_tokens, longest * max_num_seqs)
    for total in _doubling(most):
        num_rows = -(-total // longest)
        counts = [longest] * (num_rows - 1) + [total - longest * (num_rows - 1)]
        yield from _alone(counts, counts, _GREEDY, block_size)
    context, few = min(longest, _LONG_CONTEXT), min(2, max_num_seqs, max_num_batched_tokens)
    for count in _doubling(min(max_num_batched_tokens - few + 1, context)):
        yield from _alone([1] * (few - 1) + [count], [context] * few, _GREEDY, block_size)
    # As many rows sampled as there can be, beside a chunk: products with quantised weights, of which the output
    # projection may be one of another kind than the layers', are compiled for up to 16, 32 and 64 rows.
    most_rows = min(max_num_seqs, max_num_batched_tokens - 1) if longest > 1 else 0
    for num_rows in _doubling(most_rows) if most_rows > 0 else ():
        counts = [1] * (num_rows - 1) + [2]
        yield from _alone(counts, counts, _GREEDY, block_size)
    for params in _WAYS:
        chunk = [1] * (few - 1) + [min(16, longest, max_num_batched_tokens - few + 1)]
        yield from _alone(chunk, chunk, params, block_size)
        yield from _alone([1], [1], params, block_size)


def _doubling(most: int) -> Iterator[int]:
    """1, 2, 4 ... and at last `most`."""
    count = 1
    while count < most:
        yield count
        count *= 2
    yield max(1, most)


def _alone(
    counts: Sequence[int], contexts: Sequence[int], params: SamplingParams, block_size: int
) -> Iterator[ExecuteStep]:
    """One step that computes the last tokens of prompts, and one that drops them."""
    request_ids = tuple(RequestId(-1 - index) for index in range(len(counts)))
    blocks = [tuple(BlockId(block) for block in range(-(-context // block_size))) for context in contexts]
    yield ExecuteStep(
        Epoch(0),
        StepId(-1),
        request_ids,
        tuple(counts),
        start=tuple(
            StartRequest(request_id, np.zeros(context, dtype=np.int32).tobytes(), context, context - count, params)
            for request_id, count, context in zip(request_ids, counts, contexts, strict=True)
        ),
        block_tables=((),) * len(counts),
        append_blocks=tuple(zip(request_ids, blocks, strict=True)),
    )
    yield ExecuteStep(Epoch(0), StepId(-1), (), (), drop=request_ids)
