"""Flags of `octavo bench gpu`; imports nothing that takes time."""

from __future__ import annotations

import argparse

from ..flag_parser import Parser
from ..flag_values import positive, rate, seconds
from .sections import SECTIONS, sections


def add_bench_gpu(kinds: argparse._SubParsersAction[Parser]) -> None:
    """`octavo bench gpu`."""
    gpu = kinds.add_parser("gpu", help="one GPU: its ceilings, and what kernels, steps and engines get of them")
    gpu.add_argument(
        "--only",
        metavar="SECTIONS",
        type=sections,
        help=f"some of {', '.join(SECTIONS)}, with commas between; ceilings are measured in any case, and without "
        "peers octavo runs alone",
    )
    gpu.add_argument(
        "--model-shape",
        nargs="+",
        default=["qwen3-0.6b"],
        metavar="NAME",
        help="random weights in the shape of qwen3-0.6b, qwen3-8b, qwen3-14b, qwen3-30b-a3b, llama-3.1-8b, "
        "llama-3.2-1b or gpt-oss-20b; or the folder of a checkpoint",
    )
    gpu.add_argument("--repeats", type=positive, default=2, help="runs of the workload by each engine")
    gpu.add_argument("--timeout", type=rate, default=150.0, metavar="SECONDS", help="for each part")
    gpu.add_argument(
        "--seconds",
        type=seconds,
        default=480.0,
        metavar="N",
        help="for everything; what there is no time for is named (0: as long as it takes)",
    )
    gpu.add_argument("--out", metavar="DIR", help="write bench_gpu.json into this folder, after each figure")
    gpu.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the figures; to standard output without a file"
    )
    gpu.set_defaults(run=_bench_gpu, parser=gpu)


def _bench_gpu(arguments: argparse.Namespace) -> int:
    from .command import bench_gpu

    return bench_gpu(arguments)
