"""Compare ways to multiply where the CPU has instructions for bfloat16: `python -m octavo.kernels.bench_packed`.

Prints, for so many rows, the milliseconds that all linear layers of Qwen3-0.6B but the output projection take: dense
ones by torch, by the C kernel on plain matrices and packed (`linear_packed`), and quantised ones by `linear_quantized`
and widened (`linear_widened`). What `models/layers.py` decides by rows follows from them. Ways take turns, so that load
from elsewhere falls on all; medians.

Elsewhere `--dtype float32` shows that packing works; nothing is widened then.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F

from . import cpu_build, huge_pages
from .linear_dense import linear_dense
from .linear_packed import PackedWeight, Packer, linear_packed
from .linear_quantized import linear_quantized
from .linear_widened import linear_widened
from .quantized_weight import QuantizedWeight
from .weight_quantization import quantize

_SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))  # qkv, o, gate_up, down
_NUM_LAYERS = 28
_SAMPLED_LAYERS = 4  # of which so many are held: together more than the caches
_BITS_AND_GROUP = {"int8": (8, 64), "int4": (4, 32)}  # as `--quantization` makes them
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_W = TypeVar("_W", torch.Tensor, PackedWeight, QuantizedWeight)
_Step = Callable[[dict[int, torch.Tensor]], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print a line for each number of rows."""
    parser = argparse.ArgumentParser(prog="python -m octavo.kernels.bench_packed", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 5, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--divisor", type=int, default=1, help="make the matrices so many times smaller, either way")
    args = parser.parse_args(arguments)
    if cpu_build.library() is None:
        raise SystemExit("there is no C library to compare: see the log line above")
    torch.set_num_threads(args.threads)
    dtype = _DTYPES[args.dtype]
    shapes = [(rows // args.divisor, columns // args.divisor) for rows, columns in _SHAPES] * _SAMPLED_LAYERS
    ways = _ways(shapes, dtype)
    print(f"torch {torch.__version__}, {args.dtype}, {args.threads} thread(s), ms for {_NUM_LAYERS} layers")
    print(f"{'rows':>5} " + " ".join(f"{name:>14}" for name in ways))
    for num_rows in args.rows:
        inputs = {columns: torch.randn(num_rows, columns).to(dtype) for _, columns in shapes}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(args.repeats + 1):
            for name, step in ways.items():
                started = time.perf_counter()
                step(inputs)
                if repeat:  # the first makes what is kept for this number of rows
                    taken[name].append((time.perf_counter() - started) * 1e3 * _NUM_LAYERS / _SAMPLED_LAYERS)
        print(f"{num_rows:5} " + " ".join(f"{statistics.median(some):14.1f}" for some in taken.values()), flush=True)


def _ways(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> dict[str, _Step]:
    """By name: a step, given inputs by their width."""
    dense = [huge_pages.place([torch.randn(shape)], dtype) for shape in shapes]
    ways = {"torch": _step(F.linear, dense), "linear_dense": _step(linear_dense, dense)}
    packer = Packer()
    packed = [held for held in map(packer.pack, dense) if held is not None]
    if len(packed) == len(dense):
        ways["linear_packed"] = _step(linear_packed, packed)
    else:
        print("matrices are not packed here: see the log line above; --dtype float32 may be")
    for name, (bits, group_size) in _BITS_AND_GROUP.items():
        quantized = [quantize(weight, bits=bits, group_size=group_size) for weight in dense]
        ways[name] = _step(_quick, quantized)
        if dtype is not torch.float32:
            ways[f"{name} widened"] = _step(linear_widened, quantized)
    return ways


def _quick(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    return linear_quantized(x, weight, quick=True)


def _step(multiply: Callable[[torch.Tensor, _W], torch.Tensor], weights: Sequence[_W]) -> _Step:
    def step(inputs: dict[int, torch.Tensor]) -> None:
        with torch.inference_mode():
            for weight in weights:
                multiply(inputs[weight.shape[1]], weight)

    return step


if __name__ == "__main__":
    main()
