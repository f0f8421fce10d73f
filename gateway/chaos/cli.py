"""Flags of `octavo chaos`."""

from __future__ import annotations

import argparse

from ..durations import duration, pause
from ..flag_parser import Parser
from ..flag_values import positive

KINDS = ("executor", "engine", "edge", "tokenizer", "detokenizer")


def add_chaos(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    chaos = commands.add_parser(
        "chaos",
        help="kill, stop and delay processes of a running server, and compare every stream with an undisturbed run",
        description="Streams run all the time; at random moments a fault hits one of the server's processes. Processes "
        "are found by their titles among the relatives of the one that listens on the URL's port, so this runs on the "
        "server's own host, as its user or root. Tokenizer and detokenizer have no process of their own: they are "
        "failed through POST /debug/crash, as is every actor of a server in one process; the server needs "
        "--enable-fault-injection for that. Exit status 0: every stream finished, and with the very answer it would "
        "have had.",
    )
    chaos.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    chaos.add_argument("--api-key", help="key to send")
    chaos.add_argument("--streams", type=positive, default=64, help="open at any time")
    chaos.add_argument(
        "--kill",
        nargs="+",
        choices=KINDS,
        default=None,
        metavar="ACTOR",
        help=f"whom: {', '.join(KINDS)}; default: executor, with --for all that can be hit",
    )
    amount = chaos.add_mutually_exclusive_group()
    amount.add_argument("--times", type=positive, help="faults to inject; default: 20")
    amount.add_argument(
        "--for", dest="for_s", type=duration, metavar="TIME", help="kill, stop and delay in turn for so long: 10m"
    )
    chaos.add_argument(
        "--signal",
        choices=["KILL", "STOP"],
        default="KILL",
        help="STOP: let it hang, and go on once it has been replaced, if it is still there",
    )
    chaos.add_argument("--seed", type=int, default=0, help="of requests, moments and victims")
    chaos.add_argument(
        "--every",
        type=pause,
        default=2.5,
        metavar="TIME",
        help="mean pause between a recovery, when all streams have gone on, and the next fault; a server gives up when "
        "it must replace an actor more often than its restart budget allows",
    )
    chaos.add_argument("--output-len", type=positive, default=128, help="most tokens of an answer")
    chaos.add_argument(
        "--give-up", type=duration, default=60.0, metavar="TIME", help="for a stream that gets nothing for so long"
    )
    chaos.add_argument("--json", action="store_true", help="print the report as JSON")
    start = chaos.add_mutually_exclusive_group()
    start.add_argument(
        "--restart", metavar="COMMAND", help="for --kill edge: starts the server again (it needs --journal)"
    )
    start.add_argument(
        "--serve",
        nargs=argparse.REMAINDER,
        metavar="FLAG",
        help="start `octavo serve` with these flags at --url for the run, and again when its edge is killed, with a "
        "journal of its streams; the last flag of this command",
    )
    chaos.set_defaults(run=_chaos, parser=chaos)


def _chaos(arguments: argparse.Namespace) -> int:
    from .run import chaos

    return chaos(arguments)
