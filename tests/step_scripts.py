"""Random steps as a scheduler and an allocator could plan them, and the two batches that take them in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from octavo.actors.executor.gpu.device_batch import DeviceBatch
from octavo.actors.executor.gpu.mixed_sizes import MixedSizes
from octavo.actors.executor.gpu.packed_step import PackedStep
from octavo.actors.executor.gpu.step_diff import StepDiff
from octavo.actors.executor.sampler import Sampler
from octavo.actors.executor.standing_batch import StandingBatch, StepArrays
from octavo.kernels.step_layout import RowInputs, StepLayout, TokenInputs
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest

VOCAB_SIZE = 1000
MAX_ROWS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_STATE_ROWS = 6, 40, 4, 12
LAYOUT = StepLayout(MAX_ROWS, MAX_MODEL_LEN, BLOCK_SIZE)
MIXED_SIZES = MixedSizes(MAX_ROWS, (10, 30))
PADDED_LAYOUT = StepLayout(MIXED_SIZES.most_rows, MAX_MODEL_LEN, BLOCK_SIZE)


@dataclass
class _Request:
    num_tokens: int
    num_computed: int
    num_blocks: int


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.25]),
        top_k=rng.choice([0, -1, 5, 2**40]),
        top_p=rng.choice([1.0, 0.75]),
        min_p=rng.choice([0.0, 0.125]),
        seed=rng.getrandbits(64),
    )


def random_steps(seed: int, num_steps: int) -> Iterator[ExecuteStep]:
    """Starts (some with cached tokens), chunks, decodes, drops, requests that start again, rows that rest."""
    rng = random.Random(seed)
    live: dict[RequestId, _Request] = {}
    next_id = 0
    for index in range(num_steps):
        drop = [request_id for request_id in live if rng.random() < 0.1 or live[request_id].num_tokens > 34]
        for request_id in drop:
            del live[request_id]
        start, tables = [], []
        again = list(drop)
        while len(live) < MAX_ROWS and rng.random() < 0.5:
            request_id = RequestId(again.pop()) if again and rng.random() < 0.5 else RequestId(next_id := next_id + 1)
            num_prompt, num_output = rng.randint(1, 25), rng.choice([0, 0, 3])
            cached = rng.randint(0, (num_prompt - 1) // BLOCK_SIZE)
            token_ids = np.array([rng.randrange(VOCAB_SIZE) for _ in range(num_prompt + num_output)], dtype=np.int32)
            start.append(
                StartRequest(request_id, token_ids.tobytes(), num_prompt, cached * BLOCK_SIZE, random_params(rng))
            )
            tables.append(_blocks(rng, cached))
            live[request_id] = _Request(len(token_ids), cached * BLOCK_SIZE, cached)
        rows = [(request_id, request) for request_id, request in live.items() if rng.random() < 0.8]
        scheduled = [
            (request_id, request, rng.randint(1, request.num_tokens - request.num_computed))
            for request_id, request in rows
        ]
        scheduled.sort(key=lambda row: row[2] != 1)  # decodes first
        append = []
        for request_id, request, count in scheduled:
            request.num_computed += count
            missing = -(-request.num_computed // BLOCK_SIZE) - request.num_blocks
            if missing > 0:
                append.append((request_id, _blocks(rng, missing)))
                request.num_blocks += missing
            if request.num_computed == request.num_tokens:
                request.num_tokens += 1
        yield ExecuteStep(
            Epoch(0),
            StepId(index),
            tuple(request_id for request_id, _, _ in scheduled),
            tuple(count for _, _, count in scheduled),
            start=tuple(start),
            block_tables=tuple(tables),
            append_blocks=tuple(append),
            drop=tuple(drop),
        )


def _blocks(rng: random.Random, count: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(rng.randrange(500)) for _ in range(count))


@dataclass
class Expected:
    """A step as the CPU's batch arranges it, and of each row that samples: its start, its outputs so far, its token."""

    arrays: StepArrays
    starts: list[StartRequest]
    num_output_tokens: list[int]
    token_ids: list[int]


class BothBatches:
    """The CPU's standing batch and the host's side of the device's, fed with the same steps and tokens."""

    def __init__(self, seed: int = 1) -> None:
        self._standing = StandingBatch(max_num_rows=NUM_STATE_ROWS, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE)
        self.batch = DeviceBatch(LAYOUT, NUM_STATE_ROWS)
        self._sampler = Sampler(VOCAB_SIZE)
        self._starts: dict[RequestId, StartRequest] = {}
        self._rng = random.Random(seed)
        self._words = [torch.full((LAYOUT.diff + 1000,), -7, dtype=torch.int32) for _ in range(2)]

    def take(self, step: ExecuteStep) -> tuple[torch.Tensor, PackedStep, Expected | None]:
        """The step as it is packed, and what it has to mean; None if it has no rows."""
        diff = StepDiff(LAYOUT)
        for request_id in step.drop:
            self.batch.drop(request_id)
            self._sampler.remove(request_id)
        for start, table in zip(step.start, step.block_tables, strict=True):
            tokens = list(np.frombuffer(start.token_ids, dtype=np.int32))
            self._sampler.add(start.request_id, start.params, tokens, start.num_prompt_tokens, ())
            standing = self.batch.start(start, len(table), self._sampler.state_of(start.request_id))
            diff.write_start(standing.row, start, table, standing.sampling.seed)
            self._starts[start.request_id] = start
        diff.write_blocks(self.batch.append_blocks(step))
        words = self._words[step.step_id % 2]  # two that take turns, as steps in flight do
        packed = self.batch.pack(step, diff, words.numpy())
        assert packed.num_words == diff.packed_words
        self._standing.apply(step)
        if not step.request_ids:
            return words, packed, None
        arrays = self._standing.gather(step)
        starts = [self._starts[request_id] for request_id in arrays.sampling_requests]
        num_output_tokens = [
            len(self._standing.token_ids(start.request_id)) - start.num_prompt_tokens for start in starts
        ]
        token_ids = [self._rng.randrange(VOCAB_SIZE) for _ in starts]
        self._standing.append(arrays.sampling_requests, token_ids)
        return words, packed, Expected(arrays, starts, num_output_tokens, token_ids)


def empty_inputs(num_tokens: int, fill: int = -9) -> tuple[RowInputs, TokenInputs]:
    """Inputs that show what was not written."""
    rows, tokens = RowInputs.empty(LAYOUT, torch.device("cpu")), TokenInputs.empty(num_tokens, torch.device("cpu"))
    for tensor in (tokens.input_ids, tokens.positions, tokens.slot_mapping, rows.block_tables):
        tensor.fill_(fill)
    return rows, tokens


def assert_inputs(
    rows: RowInputs, tokens: TokenInputs, words: torch.Tensor, packed: PackedStep, expected: Expected
) -> None:
    """What was gathered is what the CPU's batch would have given to model and sampler; padding is padding."""
    arrays, n = expected.arrays, packed.num_tokens
    assert tokens.input_ids[:n].tolist() == arrays.input_ids.tolist()
    assert tokens.positions[:n].tolist() == arrays.positions.tolist()
    assert tokens.slot_mapping[:n].tolist() == arrays.slot_mapping.tolist()
    assert set(tokens.input_ids[n:].tolist()) <= {0}
    assert set(tokens.positions[n:].tolist()) <= {0}
    assert set(tokens.slot_mapping[n:].tolist()) <= {-1}
    query_start = words[LAYOUT.query_start :][: MAX_ROWS + 1].tolist()
    assert query_start[: packed.num_rows + 1] == arrays.query_start.tolist()
    assert set(query_start[packed.num_rows + 1 :]) <= {n}
    context_lens = words[LAYOUT.context_lens :][:MAX_ROWS].tolist()
    assert context_lens[: packed.num_rows] == arrays.context_lens.tolist()
    assert set(context_lens[packed.num_rows :]) <= {0}
    for row, context_len in enumerate(arrays.context_lens.tolist()):
        used = -(-context_len // BLOCK_SIZE)
        assert rows.block_tables[row, :used].tolist() == arrays.block_tables[row, :used].tolist()
        assert set(rows.block_tables[row, used:].tolist()) <= {-9}
    sample_tokens = words[LAYOUT.sample_tokens :][: len(packed.sampled)].tolist()
    assert sample_tokens == arrays.sampling_tokens.tolist()
    assert tuple(standing.request_id for standing in packed.sampled) == arrays.sampling_requests
    for index, (start, num_output_tokens) in enumerate(zip(expected.starts, expected.num_output_tokens, strict=True)):
        params = start.params
        assert rows.temperature[index] == params.temperature
        assert rows.top_k[index] == (params.top_k if 0 < params.top_k < 2**31 else 0)
        assert rows.top_p[index] == params.top_p
        assert rows.min_p[index] == params.min_p
        assert int(rows.seeds[index]) % 2**64 == params.seed
        assert rows.draw_positions[index] == num_output_tokens
