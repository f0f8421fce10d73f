"""How long steps take: decodes, decodes beside a prompt, with graphs and without, prompts; device idle and host time.

The runner is the one that serves, the messages are the ones that it gets; weights are random and so is the KV that
decode steps read. `octavo bench gpu` runs this in a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from ....kernels.gpu.cases import Case, OnCase, rows_of
from ....messages.ids import BlockId, Epoch, RequestId, StepId
from ....messages.sampling import SamplingParams
from ....messages.step import ExecuteStep, StartRequest
from ..config import ExecutorConfig
from ..device import Device
from .runner import GpuRunner
from .stream import Completion, Stream, stream_of

_PARAMS = SamplingParams(temperature=0.6, seed=0, ignore_eos=True)
_DEPTH = 2
_BLOCK_SIZE = 16


class TimedStream:
    """A stream that knows how long the device was busy, and how long the host waited for it.

    Without graphs all that was submitted counts, the gaps between its launches too. With them (`watch`) only they do:
    what is around them, a copy in and one out, is short, but the host is in no hurry between its launches.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Stream = stream_of(device)
        self._is_cuda = device.type == "cuda"
        self._is_watching = False
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._busy_s = 0.0
        self.waited_s = 0.0

    def watch(self, runner: GpuRunner) -> None:
        """Count what the runner's graphs take, and nothing else."""
        self._is_watching = True
        runner.watch_graphs(lambda run: partial(self._timed, run))

    def submit(self, work: Callable[[], None]) -> Completion:
        completion = self._stream.submit(work if self._is_watching else partial(self._timed, work))
        return _Waited(self, completion) if self._is_cuda else completion

    def _timed(self, run: Callable[[], None]) -> None:
        if not self._is_cuda:
            started = time.perf_counter()
            run()
            self._busy_s += time.perf_counter() - started
            return
        begin, end = _timing_event(), _timing_event()
        begin.record()
        run()
        end.record()
        self._spans.append((begin, end))

    def take_busy_s(self) -> float:
        """Seconds that the device computed since the last time this was asked; waits for it."""
        if self._is_cuda:
            torch.cuda.synchronize()
            self._busy_s += sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
            self._spans.clear()
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no type for it


class _Waited:
    def __init__(self, stream: TimedStream, completion: Completion) -> None:
        self._stream, self._completion = stream, completion

    def is_done(self) -> bool:
        return self._completion.is_done()

    def wait(self) -> None:
        started = time.perf_counter()
        self._completion.wait()
        self._stream.waited_s += time.perf_counter() - started


def rows(
    device: torch.device,
    *,
    model: str,
    context: int = 1024,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    mixed: Sequence[Sequence[int]] = ((32, 512), (255, 512)),
    prompts: Sequence[int] = (1024, 8192),
    num_steps: int = 64,
    rounds: int = 3,
    dtype: str = "auto",
    max_num_batched_tokens: int = 8192,
    without_graphs: Sequence[int] = (1, 256),
    num_threads: int | None = None,
    first_case: int = 0,
    on_case: OnCase = lambda _number, _of, _what: None,
) -> Iterator[dict[str, Any]]:
    """Figures of one model: of steps that graphs compute, and if those cannot be had, still of those launch by launch.

    Args:
        model: folder with a config.json; its weights are random.
        context: tokens of each row, the mean over the steps that are timed.
        batches: rows of decode steps; those that the KV cache does not hold are left out, with a note.
        mixed: decodes, and tokens of the new prompt that each step computes beside them.
        prompts: lengths of prompts that are computed in one step.
        without_graphs: batches that are measured launch by launch as well.
        num_threads: of torch on the CPU.
    """
    longest = max([context + (rounds + 1) * num_steps + 1, *prompts])
    config = _config(
        *(device, model, dtype, batches, longest),
        max_num_seqs=max([*batches, *(1 + num_decodes for num_decodes, _ in mixed)]),
        max_num_batched_tokens=max([max_num_batched_tokens, *prompts]),
        graph_tokens=tuple(sorted({num_tokens for _, num_tokens in mixed})),
        num_threads=num_threads,
    )
    started = time.perf_counter()
    loaded = _loaded(config, device)
    load_s = time.perf_counter() - started
    for cache in loaded.kv_caches:
        if cache.k.is_floating_point() and cache.k.itemsize > 1:
            cache.k.normal_()
            cache.v.normal_()
    lengths = _Lengths(context, num_steps, rounds)

    def with_graphs() -> Iterator[dict[str, Any]]:
        runner, stream, warm_up_s = _ready(loaded, config, device)
        stream.watch(runner)
        yield {
            "kernel": "start",
            "shape": f"{runner.num_captured} graphs",
            "ms": (load_s + warm_up_s) * 1e3,
            "note": f"weights and KV cache {load_s:.1f} s, warm-up and graphs {warm_up_s:.1f} s",
        }
        for batch in batches:
            yield _decode_row(runner, stream, lengths, batch=batch, with_graphs=True)
        for num_decodes, num_tokens in mixed:
            yield _decode_row(runner, stream, lengths, batch=num_decodes, num_tokens=num_tokens, with_graphs=True)

    def launch_by_launch() -> Iterator[dict[str, Any]]:
        runner, stream, _ = _ready(
            loaded, msgspec.structs.replace(config, cuda_graph_sizes=(), cuda_graph_tokens=()), device
        )
        for num_tokens in prompts:
            yield _prompt_row(runner, num_tokens, rounds)
        for batch in without_graphs:
            if batch in batches:
                yield _decode_row(runner, stream, lengths, batch=batch, with_graphs=False)

    cases = [
        Case({"kernel": "steps", "shape": "with graphs"}, with_graphs),
        Case({"kernel": "steps", "shape": "launch by launch"}, launch_by_launch),
    ]
    yield from rows_of(cases, device, first=first_case, on_case=on_case)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Mean context of the timed steps; steps in a round, and rounds."""

    context: int
    num_steps: int
    rounds: int


def _ready(loaded: Device, config: ExecutorConfig, device: torch.device) -> tuple[GpuRunner, TimedStream, float]:
    """A runner that has warmed up, and how many seconds that took."""
    stream = TimedStream(device)
    started = time.perf_counter()
    runner = GpuRunner(
        loaded,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        pipeline_depth=_DEPTH,
        block_size=_BLOCK_SIZE,
        graph_sizes=config.cuda_graph_sizes,
        graph_tokens=config.cuda_graph_tokens,
        stream=stream,
    )
    runner.warm_up()
    return runner, stream, time.perf_counter() - started


def _loaded(config: ExecutorConfig, device: torch.device) -> Device:
    """The model, and on a GPU its kernels, which are compiled on all cores meanwhile."""
    if device.type != "cuda":
        return Device(config)
    from .compile_ahead import CompileAhead  # triton need not be there without a GPU
    from .fake_cuda import GpuFacts

    ahead = CompileAhead.begin(config, GpuFacts.of(device))
    try:
        loaded = Device(config, on_loaded=ahead.finish)
    finally:
        ahead.cancel()
    return loaded


def _config(  # noqa: PLR0917,RUF100 - where, what, how many and how long
    device: torch.device,
    model: str,
    dtype: str,
    batches: Sequence[int],
    longest: int,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    graph_tokens: tuple[int, ...],
    num_threads: int | None,
) -> ExecutorConfig:
    is_cuda = device.type == "cuda"
    return ExecutorConfig(
        model_path=model,
        dtype=dtype,
        load_format="dummy",
        device="cuda" if is_cuda else "cpu",
        max_model_len=longest,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        pipeline_depth=_DEPTH,
        block_size=_BLOCK_SIZE,
        memory_utilization=0.9 if is_cuda else 0.1,
        cuda_graph_sizes=tuple(sorted(batches)),
        cuda_graph_tokens=graph_tokens,
        num_threads=num_threads,
    )


def _decode_row(
    runner: GpuRunner, stream: TimedStream, lengths: _Lengths, *, batch: int, num_tokens: int = 0, with_graphs: bool
) -> dict[str, Any]:
    """Steps of `batch` decodes, in each of them beside a new prompt of `num_tokens`, if any."""
    context, num_steps, rounds = lengths.context, lengths.num_steps, lengths.rounds
    beside = f" + {num_tokens} of a prompt" if num_tokens else ""
    row: dict[str, Any] = {
        "kernel": "mixed step" if num_tokens else "decode step",
        "shape": f"B={batch} ctx={context}{beside} {'graph' if with_graphs else 'no graph'}",
        "batch": batch,
        "context": context,
    }
    if num_tokens:
        row["num_tokens"] = num_tokens
    # So that `context` is the mean over the steps that are timed, which come after `num_steps` that are not.
    context = max(2, context - (rounds + 2) * num_steps // 2)
    num_decode_blocks = batch * -(-(context + (rounds + 1) * num_steps + 1) // _BLOCK_SIZE)
    needed = num_decode_blocks + (2 * -(-(num_tokens + 1) // _BLOCK_SIZE) if num_tokens else 0)
    if needed > runner.device.plan.num_blocks:
        return {**row, "note": f"needs {needed} KV blocks of {runner.device.plan.num_blocks}"}
    vocab_size = runner.device.model.vocab_size
    steps = _decode_steps(batch, context, (rounds + 1) * num_steps, _BLOCK_SIZE, vocab_size)
    if num_tokens:
        steps = _beside_prompts(steps, num_tokens, _BLOCK_SIZE, vocab_size, first_block=num_decode_blocks)
    _run(runner, [next(steps) for _ in range(num_steps)])  # starts the requests; not timed
    walls, idles, hosts = [], [], []
    for _ in range(rounds):
        messages = [next(steps) for _ in range(num_steps)]
        stream.take_busy_s()
        stream.waited_s = 0.0
        started = time.perf_counter()
        _run(runner, messages)
        wall_s = time.perf_counter() - started
        busy_s = stream.take_busy_s()
        walls.append(wall_s / num_steps)
        idles.append(max(0.0, 1.0 - busy_s / wall_s))
        hosts.append((wall_s - stream.waited_s) / num_steps)
    runner.execute(next(steps))
    idle, host_s = statistics.median(idles), statistics.median(hosts)
    note = f"host {host_s * 1e6:.0f} us"
    if with_graphs:
        note += f", device idle {100 * idle:.1f} %"
    found = {"ms": statistics.median(walls) * 1e3, "low_ms": min(walls) * 1e3, "high_ms": max(walls) * 1e3}
    return {**row, **found, "idle": idle, "host_us": host_s * 1e6, "note": note}


def _run(runner: GpuRunner, messages: Sequence[ExecuteStep]) -> None:
    """Steps back to back, each launched before the tokens of the one before it are read."""
    in_flight: deque[Any] = deque()
    for message in messages:
        in_flight.append(runner.launch(message))
        if len(in_flight) >= _DEPTH:
            runner.collect(in_flight.popleft())
    while in_flight:
        runner.collect(in_flight.popleft())


def _decode_steps(batch: int, context: int, num_steps: int, block_size: int, vocab_size: int) -> Iterator[ExecuteStep]:
    """Steps of the same requests, the first of which starts them as if their prompts were computed; then one that
    drops them."""
    request_ids = tuple(RequestId(1 + row) for row in range(batch))
    blocks_each = -(-(context + num_steps + 1) // block_size)
    chance = np.random.default_rng(0)
    held = -(-context // block_size)
    starts = tuple(
        StartRequest(
            request_id, chance.integers(0, vocab_size, context, dtype=np.int32).tobytes(), context, context - 1, _PARAMS
        )
        for request_id in request_ids
    )
    tables = tuple(tuple(BlockId(row * blocks_each + index) for index in range(held)) for row in range(batch))
    yield ExecuteStep(Epoch(0), StepId(1), request_ids, (1,) * batch, start=starts, block_tables=tables)
    for step in range(1, num_steps):
        grown: tuple[tuple[RequestId, tuple[BlockId, ...]], ...] = ()
        if (context + step - 1) % block_size == 0:
            index = (context + step - 1) // block_size
            grown = tuple(
                (request_id, (BlockId(row * blocks_each + index),)) for row, request_id in enumerate(request_ids)
            )
        yield ExecuteStep(Epoch(0), StepId(1 + step), request_ids, (1,) * batch, append_blocks=grown)
    yield ExecuteStep(Epoch(0), StepId(1 + num_steps), (), (), drop=request_ids)


def _beside_prompts(
    steps: Iterator[ExecuteStep], num_tokens: int, block_size: int, vocab_size: int, *, first_block: int
) -> Iterator[ExecuteStep]:
    """The same steps, each of which computes a whole new prompt as well, whose request the next one drops."""
    token_ids = np.random.default_rng(2).integers(0, vocab_size, num_tokens, dtype=np.int32).tobytes()
    blocks_each = -(-(num_tokens + 1) // block_size)
    drop: tuple[RequestId, ...] = ()
    for number, step in enumerate(steps):
        if not step.request_ids:
            yield msgspec.structs.replace(step, drop=(*step.drop, *drop))
            return
        new = RequestId(len(step.request_ids) + 1 + number)
        begin = first_block + number % 2 * blocks_each  # of the step in flight before it are the others
        blocks = tuple(BlockId(begin + index) for index in range(blocks_each))
        yield msgspec.structs.replace(
            step,
            request_ids=(*step.request_ids, new),
            num_tokens=(*step.num_tokens, num_tokens),
            start=(*step.start, StartRequest(new, token_ids, num_tokens, 0, _PARAMS)),
            block_tables=(*step.block_tables, ()),
            append_blocks=(*step.append_blocks, (new, blocks)),
            drop=drop,
        )
        drop = (new,)


def _prompt_row(runner: GpuRunner, num_tokens: int, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": "prefill step", "shape": f"1 x {num_tokens}", "num_tokens": num_tokens}
    num_blocks = -(-num_tokens // _BLOCK_SIZE)
    if num_blocks > runner.device.plan.num_blocks:
        return {**row, "note": f"needs {num_blocks} KV blocks of {runner.device.plan.num_blocks}"}
    token_ids = (
        np.random.default_rng(1).integers(0, runner.device.model.vocab_size, num_tokens, dtype=np.int32).tobytes()
    )
    request_id = RequestId(1)
    times = []
    for _ in range(rounds + 1):
        start = StartRequest(request_id, token_ids, num_tokens, 0, _PARAMS)
        blocks = ((request_id, tuple(BlockId(index) for index in range(num_blocks))),)
        message = ExecuteStep(
            *(Epoch(0), StepId(1), (request_id,), (num_tokens,)),
            start=(start,),
            block_tables=((),),
            append_blocks=blocks,
        )
        started = time.perf_counter()
        runner.execute(message)
        times.append(time.perf_counter() - started)
        runner.execute(ExecuteStep(Epoch(0), StepId(2), (), (), drop=(request_id,)))
    seconds = statistics.median(times[1:])
    found = {"ms": seconds * 1e3, "low_ms": min(times[1:]) * 1e3, "high_ms": max(times[1:]) * 1e3}
    return {**row, **found, "note": f"{num_tokens / seconds:,.0f} tok/s"}
