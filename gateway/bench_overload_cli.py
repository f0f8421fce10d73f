"""Flags of `octavo bench overload`."""

from __future__ import annotations

import argparse

from .durations import duration
from .flag_parser import Parser
from .flag_values import positive, rate


def add_bench_overload(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the benchmark."""
    overload = kinds.add_parser("overload", help="a running server that is asked for more than it can do")
    overload.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server")
    overload.add_argument("--api-key", help="key to send")
    overload.add_argument("--concurrency", type=positive, default=128, help="clients that find the peak")
    overload.add_argument("--peak-for", dest="peak_s", type=duration, default=20.0, metavar="TIME", help="to find it")
    overload.add_argument("--factor", type=rate, default=5.0, help="of the peak's rate")
    overload.add_argument("--for", dest="for_s", type=duration, default=120.0, metavar="TIME", help="of the overload")
    overload.add_argument("--input-len", type=positive, default=32, help="tokens")
    overload.add_argument("--output-len", type=positive, default=64, help="tokens")
    overload.add_argument("--workload-seed", type=int, default=0, help="of prompts and arrivals")
    overload.add_argument("--json", metavar="FILE", help="write the figures to this file; - for standard output")
    overload.set_defaults(run=_overload, parser=overload)


def _overload(arguments: argparse.Namespace) -> int:
    from .bench_overload import bench_overload

    return bench_overload(arguments)
