"""Serve random steps on a GPU that is not there, and tell what was compiled when; run by a test, or by hand:

    python tests/gpu_dry_run.py '[{"preset": "qwen3-8b", "kv_cache_dtype": "fp8", "compiles": true}]'

The answer is a line of JSON for each.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda import Kernels, fake_cuda
from fp8_checkpoints import quantization_config

from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu.graphs import Graphs
from octavo.actors.executor.gpu.mixed_sizes import MixedSize
from octavo.actors.executor.gpu.runner import GpuRunner
from octavo.actors.executor.runner import StepRunner, load_runner
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest
from octavo.models.parallel import ParallelGroup
from octavo.models.shapes import write_config_folder

_LENGTHS = (1, 2, 5, 17, 20, 30, 100, 300, 600, 1500)


class Replays:
    """Counts the steps with chunks of prompts that a graph computed."""

    def __init__(self, graphs: Graphs) -> None:
        self.num_mixed = 0
        self._run, graphs.run = graphs.run, self._count  # type: ignore[method-assign]

    def _count(self, size: int | MixedSize) -> None:
        self.num_mixed += isinstance(size, MixedSize)
        self._run(size)


class Requests:
    """Random requests as a scheduler would run them: decodes first, prompts in chunks, some end at each step."""

    def __init__(self, rng: random.Random, *, max_rows: int, max_tokens: int, max_len: int, block_size: int) -> None:
        self._rng = rng
        self._max_rows, self._max_tokens, self._max_len, self._block_size = max_rows, max_tokens, max_len, block_size
        self._next_id = 1
        self._tokens: dict[int, int] = {}  # of each request: how many it has, computed, and blocks
        self._computed: dict[int, int] = {}
        self._blocks: dict[int, int] = {}

    def step(self, index: int) -> ExecuteStep:
        rng = self._rng
        most_gone = rng.choice([0.0, 0.01, 0.5])
        gone = [
            one
            for one in self._tokens
            if self._tokens[one] + 2 > self._max_len or rng.random() < rng.random() * most_gone
        ]
        for one in gone:
            del self._tokens[one], self._computed[one], self._blocks[one]
        longest = rng.randint(1, len(_LENGTHS))
        fresh = []
        for _ in range(rng.choice([0, 1, 5, self._max_rows])):
            if len(self._tokens) < self._max_rows:
                fresh.append(self._next_id)
                self._tokens[self._next_id] = min(rng.choice(_LENGTHS[:longest]), self._max_len - 2)
                self._computed[self._next_id] = self._blocks[self._next_id] = 0
                self._next_id += 1
        room, counts = self._max_tokens, {}
        for one, tokens in self._tokens.items():
            count = min(tokens - self._computed[one], room)
            if count > 1 and rng.random() < 0.3:
                count = rng.randint(1, count)
            if count:
                counts[one] = count
                room -= count
        started = [one for one in fresh if one in counts]
        for one in set(fresh) - set(started):
            del self._tokens[one], self._computed[one], self._blocks[one]
        rows = sorted(counts, key=lambda one: counts[one] != 1)
        starts = tuple(self._start(one) for one in started)
        grown = tuple(self._grow(one, counts[one]) for one in rows)
        return ExecuteStep(
            Epoch(0),
            StepId(index),
            tuple(RequestId(one) for one in rows),
            tuple(counts[one] for one in rows),
            drop=tuple(RequestId(one) for one in gone),
            start=starts,
            block_tables=((),) * len(starts),
            append_blocks=tuple(pair for pair in grown if pair[1]),
        )

    def _start(self, one: int) -> StartRequest:
        rng, count = self._rng, self._tokens[one]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7]),
            seed=1,
            top_k=rng.choice([0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            logprobs=rng.choice([None] * 8 + [0, 3, 20]),
            repetition_penalty=(1.0, 1.1)[one % 2],
            logit_bias=(None, {5: 1.0}, None)[one % 3],
            min_tokens=(0, 4)[one // 2 % 2],
            stop_token_ids=(2,),
        )
        return StartRequest(RequestId(one), np.zeros(count, dtype=np.int32).tobytes(), count, 0, params)

    def _grow(self, one: int, count: int) -> tuple[RequestId, tuple[BlockId, ...]]:
        """Count tokens as computed, the next one as sampled, and give it the blocks for that."""
        self._computed[one] += count
        self._tokens[one] += self._computed[one] == self._tokens[one]
        needed = -(-self._computed[one] // self._block_size) - self._blocks[one]
        self._blocks[one] += needed
        return RequestId(one), tuple(BlockId(self._rng.randrange(1000)) for _ in range(needed))


def forbid_waits(kernels: Kernels, runner: GpuRunner) -> None:
    """Let it be noted where a step that the GPU does alone waits for it, or has it wait."""
    run = runner._run

    def running(*args: Any) -> None:
        with kernels.no_waits():
            run(*args)

    runner._run = running  # type: ignore[method-assign]


def mxfp4_fields(in_mxfp4: bool) -> dict[str, Any]:
    """What a configuration has more where experts are stored so."""
    return {"quantization_config": {"quant_method": "mxfp4"}} if in_mxfp4 else {}


def fp8_fields(kind: str) -> dict[str, Any]:
    """What a configuration has more where linear layers are in fp8, of a kind of `fp8_checkpoints`."""
    return {"quantization_config": quantization_config(kind)} if kind else {}


def load(
    preset: str,
    *,
    num_layers: int = 2,
    in_mxfp4: bool = False,
    in_fp8: str = "",
    group: ParallelGroup | None = None,
    **options: Any,
) -> tuple[ExecutorConfig, GpuRunner | StepRunner]:
    """Load a model's shape and warm up."""
    with tempfile.TemporaryDirectory() as folder:
        fields = {"num_hidden_layers": num_layers, **mxfp4_fields(in_mxfp4), **fp8_fields(in_fp8)}
        write_config_folder(preset, Path(folder), tokenizer=None, **fields)
        config = ExecutorConfig(
            **{"model_path": folder, "load_format": "dummy", "device": "cuda", "max_model_len": 2048, **options}
        )
        return config, load_runner(config, group)


def serve(kernels: Kernels, preset: str, *, num_steps: int = 30, **options: Any) -> dict[str, Any]:
    """Load a model's shape, warm up, and run random steps."""
    before, captured, launched_before = len(kernels.made), len(kernels.captured), Counter(kernels.launched)
    kernels.waits.clear()
    kernels.races.clear()
    config, runner = load(preset, **options)
    assert isinstance(runner, GpuRunner)
    warm = len(kernels.made)
    replays = Replays(runner._graphs)
    requests = Requests(
        random.Random(0),
        max_rows=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_len=runner.device.plan.max_model_len,
        block_size=config.block_size,
    )
    forbid_waits(kernels, runner)
    most_rows = most_mixed = num_failed = 0
    in_flight: deque[Any] = deque()
    for index in range(num_steps):
        step = requests.step(index)
        in_flight.append(runner.launch(step))
        if len(in_flight) == runner.max_launched:
            num_failed += len(runner.collect(in_flight.popleft()).failed)
        most_rows = max(most_rows, len(step.num_tokens))
        if max(step.num_tokens, default=0) > 1:
            most_mixed = max(most_mixed, len(step.num_tokens))
    num_failed += sum(len(runner.collect(launched).failed) for launched in in_flight)
    return {
        "preset": preset,
        "num_compiled": warm - before,
        "num_captured": runner.num_captured,
        "num_late": runner.num_late,
        "num_mixed_replays": replays.num_mixed,
        "launched": sorted(kernels.launched - launched_before),
        "late": kernels.made[warm:],
        "captured": kernels.captured[captured:],
        "waits": sorted(set(kernels.waits)),
        "races": sorted(set(kernels.races)),
        "num_failed": num_failed,
        "num_launches": kernels.num_launches,
        "num_hits": kernels.num_hits,
        "most_rows": most_rows,
        "most_rows_with_prompts": most_mixed,
    }


def answers(questions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One process for all, whose kernels know what the ones before have made: give different ones."""
    with fake_cuda(compiles=any(question.pop("compiles", False) for question in questions)) as kernels:
        for question in questions:
            yield serve(kernels, **question)


if __name__ == "__main__":
    for answer in answers(json.loads(sys.argv[1])):
        print(json.dumps(answer), flush=True)
