"""The `octavo` command. Only what a chosen command needs is imported, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from .. import __version__
from .bench_drain_cli import add_bench_drain
from .bench_overload_cli import add_bench_overload
from .chaos.cli import add_chaos
from .flag_parser import Parser
from .flag_values import named_path, positive, rate, seconds
from .flags import add_engine_flags
from .gpu_bench.flags import add_bench_gpu
from .keys import add_keys
from .node_cli import add_node
from .server_flags import add_nodes_flags, add_server_flags
from .simulate.cli import add_sim


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the process's exit status. User errors print one line and give 2, the
    machine's refusals 1, Ctrl-C 130."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 0
    from ..messages.errors import OctavoError

    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # an address in use, a file that cannot be written
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> Parser:
    """All commands with their flags."""
    parser = Parser(prog="octavo", description="An LLM inference engine built as a small company of actors.")
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    _add_serve(commands)
    _add_run(commands)
    _add_bench(commands)
    add_sim(commands)
    add_node(commands)
    add_chaos(commands)
    add_keys(commands)
    doctor = commands.add_parser("doctor", help="look at this machine and installation, and say what octavo would do")
    doctor.set_defaults(run=_doctor, parser=doctor)
    return parser


def _add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    serve = commands.add_parser("serve", help="serve a model over an OpenAI-compatible HTTP API")
    add_engine_flags(serve)
    add_server_flags(serve)
    add_nodes_flags(serve)
    group = serve.add_argument_group("log")
    group.add_argument(
        "--log-format", choices=["auto", "human", "json"], default="auto", help="auto: human on a terminal"
    )
    group.add_argument(
        "--log-interval", type=seconds, default=10.0, help="seconds between lines of throughput while busy; 0: none"
    )
    serve.set_defaults(run=_serve, parser=serve)


def _add_run(commands: argparse._SubParsersAction[Parser]) -> None:
    run = commands.add_parser("run", help="chat with a model in the terminal")
    add_engine_flags(run)
    group = run.add_argument_group("chat")
    group.add_argument("--prompt", help="answer this and exit, instead of a conversation")
    group.add_argument("--system", help="system message")
    group.add_argument("--temperature", type=float, help="default: the checkpoint's, or 0.7")
    group.add_argument("--top-p", type=float, help="default: the checkpoint's, or 0.95")
    group.add_argument("--max-tokens", type=positive, help="of an answer; default: the checkpoint's, or 512")
    run.set_defaults(run=_chat, parser=run)


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser("bench", help="measure throughput and latency")
    bench.set_defaults(run=_bench_help, parser=bench)
    kinds = bench.add_subparsers(title="benchmarks", metavar="KIND", parser_class=Parser)

    offline = kinds.add_parser("offline", help="this machine: octavo beside transformers, or beside other engines")
    add_engine_flags(offline)
    offline.set_defaults(enable_prefix_caching=False)  # prompts are random: there is nothing to be reused
    _add_workload(offline, num_prompts=None, input_len=None, output_len=None, lengths="64, with --peers 128")
    offline.add_argument(
        "--concurrency", type=positive, nargs="+", help="prompts at once; default: 1 32, with --peers 1 8 32"
    )
    offline.add_argument(
        "--compare", choices=["transformers", "none"], default="transformers", help="what to time beside it"
    )
    offline.add_argument("--compare-prompts", type=positive, default=4, help="prompts of the sequential loop")
    offline.add_argument("--repeats", type=positive, default=3, help="timed rounds; medians are printed")
    offline.add_argument("--json", metavar="FILE", help="write the figures to this file; - for standard output")
    _add_peers(offline)
    offline.set_defaults(run=_bench_offline, parser=offline)

    serve = kinds.add_parser("serve", help="a running server, over HTTP, streaming")
    serve.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server")
    serve.add_argument("--api-key", help="key to send")
    serve.add_argument("--model", help="name to ask for; default: the server's first")
    _add_workload(serve, num_prompts=100, input_len=64, output_len=64)
    serve.add_argument(
        "--request-rate", type=rate, default=float("inf"), help="requests a second (Poisson); inf: all at once"
    )
    serve.add_argument("--max-concurrency", type=positive, default=64, help="open streams at once")
    serve.add_argument("--json", metavar="FILE", help="write the figures to this file; - for standard output")
    serve.set_defaults(run=_bench_serve, parser=serve)
    add_bench_overload(kinds)
    add_bench_gpu(kinds)
    add_bench_drain(kinds)


def _add_peers(parser: Parser) -> None:
    from .peers.catalog import PEERS

    group = parser.add_argument_group("other engines")
    group.add_argument(
        "--peers",
        nargs="*",
        metavar="ENGINE",
        help=f"measure beside these, or beside all that are installed: {', '.join(PEERS)}; "
        "octavo-deterministic, octavo-not-deterministic; module:Class for your own",
    )
    group.add_argument("--peer-gguf", metavar="FILE", help="the same model as GGUF, for peers that read nothing else")
    group.add_argument("--peer-openvino", metavar="FOLDER", help="the same model as an OpenVINO IR")
    group.add_argument(
        "--peer-python",
        metavar="ENGINE=PYTHON",
        type=named_path,
        action="append",
        default=[],
        help="interpreter of another environment, in which this peer is installed; may be repeated",
    )
    group.add_argument(
        "--peer-timeout", metavar="SECONDS", type=rate, default=1800.0, help="for a peer to load, and for each run"
    )
    group.add_argument(
        "--prefill-len", type=positive, nargs="*", default=[512, 2048], help="prompts whose prefill is timed"
    )
    group.add_argument(
        "--mixed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="32 requests with prompts of 32 to 512 and outputs of 16 to 256 tokens",
    )


def _add_workload(
    parser: Parser, *, num_prompts: int | None, input_len: int | None, output_len: int | None, lengths: str = ""
) -> None:
    about_lengths = f"tokens; default: {lengths}" if lengths else "tokens"
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--num-prompts",
        type=positive,
        default=num_prompts,
        help="requests to send" if num_prompts else "prompts in a round; default: as many as run at once, at least 4",
    )
    group.add_argument(
        "--random-input-len", "--input-len", dest="input_len", type=positive, default=input_len, help=about_lengths
    )
    group.add_argument(
        "--random-output-len", "--output-len", dest="output_len", type=positive, default=output_len, help=about_lengths
    )
    group.add_argument("--workload-seed", type=int, default=0, help="of prompts and arrivals")


def _serve(arguments: argparse.Namespace) -> int:
    from .serve import serve

    return serve(arguments)


def _chat(arguments: argparse.Namespace) -> int:
    from .chat import chat

    return chat(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()


def _bench_help(arguments: argparse.Namespace) -> int:
    arguments.parser.print_help()
    return 0


def _bench_offline(arguments: argparse.Namespace) -> int:
    is_beside_peers = arguments.peers is not None
    arguments.input_len = arguments.input_len or (128 if is_beside_peers else 64)
    arguments.output_len = arguments.output_len or (128 if is_beside_peers else 64)
    arguments.concurrency = arguments.concurrency or ([1, 8, 32] if is_beside_peers else [1, 32])
    if is_beside_peers:
        from .bench_peers import bench_peers

        return bench_peers(arguments)
    from .bench_offline import bench_offline

    return bench_offline(arguments)


def _bench_serve(arguments: argparse.Namespace) -> int:
    from .bench_serve import bench_serve

    return bench_serve(arguments)
