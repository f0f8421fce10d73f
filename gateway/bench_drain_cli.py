"""Flags of `octavo bench drain`."""

from __future__ import annotations

import argparse

from .durations import duration
from .flag_parser import Parser
from .flag_values import positive


def add_bench_drain(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the benchmark."""
    drain = kinds.add_parser("drain", help="a server that it starts, and tells to stop under hundreds of streams")
    drain.add_argument("model", nargs="?", help="folder, GGUF file or hub name; without one, the model that is shipped")
    drain.add_argument("--streams", type=positive, default=500, help="open when the server is told to stop")
    drain.add_argument("--output-len", type=positive, default=64, help="tokens of each")
    drain.add_argument(
        "--limit", dest="limit_s", type=duration, default=30.0, metavar="TIME", help="the server's --drain-timeout"
    )
    drain.add_argument("--workload-seed", type=int, default=0, help="of the prompts")
    drain.add_argument(
        "--serve-flags", nargs=argparse.REMAINDER, default=[], metavar="FLAG", help="of `octavo serve`; the last flag"
    )
    drain.add_argument("--json", metavar="FILE", help="write the figures to this file; - for standard output")
    drain.set_defaults(run=_drain, parser=drain)


def _drain(arguments: argparse.Namespace) -> int:
    from .bench_drain import bench_drain

    return bench_drain(arguments)
