"""`octavo bench offline`: this engine beside a sequential `transformers.generate` loop, in one run.

Both take the same checkpoint, dtype, threads, prompts (random token ids) and output length, greedy, ignoring the end
token. Rounds alternate, and figures are medians of rounds with their ratio, because machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from typing import Any

import msgspec
import psutil
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..actors.runtime.logs import configure_logs
from ..messages.sampling import SamplingParams
from .config import EngineConfig, make_config
from .engine import Engine
from .flags import engine_fields
from .latency import write_json


class OfflineFigure(msgspec.Struct, frozen=True, kw_only=True):
    """Output tokens per second at one concurrency; medians over rounds."""

    concurrency: int
    octavo_tokens_per_s: float
    transformers_tokens_per_s: float | None
    ratio: float | None
    octavo_rounds: list[float]
    transformers_rounds: list[float]


def bench_offline(arguments: argparse.Namespace) -> int:
    """Print a table of throughput by concurrency."""
    configure_logs("human")
    config = make_config(engine_fields(arguments))
    figures, load_seconds, resident_bytes = asyncio.run(_bench(config, arguments))
    table = Table("prompts at once", "octavo tok/s", "transformers one by one tok/s", "ratio", title_justify="left")
    table.title = (
        f"octavo bench offline: {arguments.input_len} in, {arguments.output_len} out, {arguments.repeats} rounds"
    )
    for figure in figures:
        table.add_row(
            str(figure.concurrency),
            f"{figure.octavo_tokens_per_s:.1f}",
            "-" if figure.transformers_tokens_per_s is None else f"{figure.transformers_tokens_per_s:.1f}",
            "-" if figure.ratio is None else f"{figure.ratio:.2f}x",
        )
    Console().print(table)
    print(
        f"weights loaded in {load_seconds:.2f} s; resident set with octavo's KV cache {resident_bytes / 2**20:,.0f} MiB"
    )
    write_json({"figures": figures, "load_seconds": load_seconds, "resident_bytes": resident_bytes}, arguments.json)
    return 0


def _resident_bytes() -> int:
    """Of this process and those that it started, what they share counted for each."""
    own = psutil.Process()
    return sum(process.memory_info().rss for process in (own, *own.children(recursive=True)))


async def _bench(config: EngineConfig, arguments: argparse.Namespace) -> tuple[list[OfflineFigure], float, int]:
    """Figures, seconds to load, and the resident set after a first round, before the other engine is there."""
    chance = random.Random(arguments.workload_seed)  # noqa: S311  # a workload, not a secret
    async with Engine(config=config) as engine:
        low = min(engine.vocab_size // 2, 200)  # above the special tokens, which lie at the beginning in most models
        rounds_of: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in arguments.concurrency}
        await _run_round(engine, _prompts(chance, engine, low, arguments, 2), 2)  # first-use work is not timed
        load_seconds, resident_bytes = engine.load_seconds, _resident_bytes()
        reference = None
        if arguments.compare == "transformers":
            reference = await asyncio.to_thread(_Reference, engine)
        total = arguments.repeats * len(rounds_of)
        with tqdm(total=total, desc="rounds", unit="round") as bar:
            for _ in range(arguments.repeats):
                for concurrency, (ours, theirs) in rounds_of.items():
                    count = arguments.num_prompts or max(concurrency, 4)
                    prompts = _prompts(chance, engine, low, arguments, count)
                    ours.append(await _run_round(engine, prompts, concurrency, arguments.output_len))
                    if reference is not None:
                        some = prompts[: arguments.compare_prompts]
                        theirs.append(await asyncio.to_thread(reference.run, some, arguments.output_len))
                    bar.update(1)
    figures = [
        OfflineFigure(
            concurrency=concurrency,
            octavo_tokens_per_s=statistics.median(ours),
            transformers_tokens_per_s=statistics.median(theirs) if theirs else None,
            ratio=statistics.median(ours) / statistics.median(theirs) if theirs else None,
            octavo_rounds=ours,
            transformers_rounds=theirs,
        )
        for concurrency, (ours, theirs) in rounds_of.items()
    ]
    return figures, load_seconds, resident_bytes


def _prompts(
    chance: random.Random, engine: Engine, low: int, arguments: argparse.Namespace, count: int
) -> list[list[int]]:
    return [[chance.randrange(low, engine.vocab_size) for _ in range(arguments.input_len)] for _ in range(count)]


async def _run_round(engine: Engine, prompts: list[list[int]], concurrency: int, output_len: int = 8) -> float:
    """Output tokens per second with so many prompts at once."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    seats = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> int:
        async with seats:
            return len((await engine.generate(prompt, params)).outputs[0].token_ids)

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return sum(counts) / (time.perf_counter() - started)


class _Reference:
    """The same checkpoint in `transformers`, one prompt after the other."""

    def __init__(self, engine: Engine) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, engine.dtype)
        self._torch: Any = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(engine.model_folder, dtype=dtype).eval()

    def run(self, prompts: list[list[int]], output_len: int) -> float:
        """Output tokens per second of the sequential loop."""
        torch = self._torch
        started = time.perf_counter()
        count = 0
        with torch.inference_mode():
            for prompt in prompts:
                ids = torch.tensor([prompt])
                output = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=output_len,
                    max_new_tokens=output_len,
                    pad_token_id=0,
                )
                count += output.shape[1] - len(prompt)
        return count / (time.perf_counter() - started)
