"""Times steps of one process and of several that serve a model together.

`python -m octavo.actors.executor.bench_ranks`: each layout runs the same steps, one for all prompts, then decodes with
no other step in flight.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

import msgspec
import structlog

from ...messages.ids import BlockId, Epoch, RequestId, StepId
from ...messages.sampling import SamplingParams
from ...messages.step import ExecuteStep, StartRequest
from ...models.checkpoint import resolve_checkpoint
from .config import ExecutorConfig

_BLOCK_SIZE = 16


def _steps(num_rows: int, num_prompt: int, num_decodes: int) -> list[ExecuteStep]:
    blocks_per_row = -(-(num_prompt + num_decodes) // _BLOCK_SIZE)
    rows = tuple(RequestId(row) for row in range(num_rows))
    params = SamplingParams(temperature=0.0, max_tokens=num_decodes)
    prompt = ExecuteStep(
        *(Epoch(1), StepId(0), rows, (num_prompt,) * num_rows),
        start=tuple(
            StartRequest(
                row, array("i", [5 + (row + i) % 90 for i in range(num_prompt)]).tobytes(), num_prompt, 0, params
            )
            for row in rows
        ),
        block_tables=((),) * num_rows,
        append_blocks=tuple(
            (row, tuple(BlockId(row * blocks_per_row + block) for block in range(blocks_per_row))) for row in rows
        ),
    )
    return [prompt, *(ExecuteStep(Epoch(1), StepId(1 + i), rows, (1,) * num_rows) for i in range(num_decodes))]


def _run_rank(config: ExecutorConfig, rank: int, args: argparse.Namespace) -> None:
    from .rank import RankExecutor

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    executor = RankExecutor(config, rank)
    facts = executor.load()
    executor.begin_epoch(Epoch(1))
    times = []
    for step in _steps(args.rows, args.prompt, args.decodes):
        start = time.perf_counter()
        executor.execute(step)
        times.append(1000 * (time.perf_counter() - start))
    executor.close()
    if facts.speaks:
        print(f"{times[0]:12.1f}{statistics.median(times[1:]):12.2f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a hub name; the shipped model if left out")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each row's prompt")
    parser.add_argument("--decodes", type=int, default=64, help="decode steps")
    parser.add_argument("--layouts", nargs="*", default=["1x1", "2x1", "1x2"], help="tensor x pipeline parallel size")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", choices=["auto", "int8", "int4"], default="auto", help="of the weights")
    parser.add_argument("--num-threads", type=int, default=1, help="of each process")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        _run_rank(msgspec.json.decode(args.config, type=ExecutorConfig), args.rank, args)
        return
    folder = resolve_checkpoint(args.model)
    print(
        f"{args.rows} rows, prompts of {args.prompt} tokens, {args.num_threads} threads a process; milliseconds a step"
    )
    print(f"{'tp x pp':>8}{'prompts':>12}{'decode':>12}", flush=True)
    for layout in args.layouts:
        tp, pp = map(int, layout.split("x"))
        with tempfile.TemporaryDirectory() as meet:
            config = ExecutorConfig(
                model_path=str(folder),
                dtype=args.dtype,
                quantization=args.quantization,
                max_num_seqs=args.rows,
                block_size=_BLOCK_SIZE,
                num_blocks=args.rows * -(-(args.prompt + args.decodes) // _BLOCK_SIZE),
                num_threads=args.num_threads,
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                init_method=f"file://{Path(meet) / 'meet'}",
            )
            print(f"{layout:>8}", end="", flush=True)
            command = [sys.executable, "-m", __spec__.name, "--config", msgspec.json.encode(config).decode()]
            command += ["--rows", str(args.rows), "--prompt", str(args.prompt), "--decodes", str(args.decodes)]
            ranks = [
                subprocess.Popen([*command, "--rank", str(rank)], stderr=subprocess.DEVNULL)  # noqa: S603 - ourselves
                for rank in range(tp * pp)
            ]
            if any(rank.wait() for rank in ranks):
                raise SystemExit(f"a rank of {layout} failed: is there memory for all, and does the model divide so?")


if __name__ == "__main__":
    main()
