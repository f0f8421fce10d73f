"""The `octavo sim` commands: their flags. What a command does is imported when it is chosen."""

from __future__ import annotations

import argparse

from ..flag_parser import Parser
from ..flag_values import positive
from .calibrate import add_calibrate_flags
from .engine import add_replica_flags
from .load import add_load_flags
from .validate import add_validate_flags


def add_sim(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `sim` with its own commands."""
    sim = commands.add_parser(
        "sim", help="capacity planning, replay and faults: the engine's own scheduler under virtual time"
    )
    sim.set_defaults(run=_sim, parser=sim)
    kinds = sim.add_subparsers(title="commands", dest="kind", metavar="KIND", parser_class=Parser)
    _add_run(kinds)
    _add_plan(kinds)
    _add_trace(kinds)
    _add_calibrate(kinds)
    _add_validate(kinds)
    _add_replay(kinds)
    _add_fuzz(kinds)


def share_of_requests(text: str) -> float:
    """0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def _add_run(kinds: argparse._SubParsersAction[Parser]) -> None:
    run = kinds.add_parser(
        "run",
        help="one configuration on one trace",
        description="Simulate one configuration on one trace. Without --gpu and --model: Llama-3.1-8B in bfloat16 on "
        "an H100, its steps timed in closed form.",
    )
    add_load_flags(run)
    add_replica_flags(run, is_sweep=False)
    group = run.add_argument_group("this run")
    group.add_argument("--replicas", "--num-replicas", dest="replicas", type=positive, default=1, help="engines")
    group.add_argument("--slo", metavar="LIMITS", help="limits such as ttft_p99<1s,tpot_p99<50ms")
    group.add_argument(
        "--outage",
        action="append",
        default=[],
        metavar="REPLICA:BEGIN:END",
        help="a replica that is lost for a while, in seconds; may be repeated",
    )
    group.add_argument(
        "--fast-forward",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="skip over stretches of pure decode; changes no result",
    )
    _add_output(run)
    run.add_argument("--requests-out", metavar="FILE", help="write a line for each request to this CSV file")
    run.set_defaults(parser=run)


def _add_plan(kinds: argparse._SubParsersAction[Parser]) -> None:
    plan = kinds.add_parser(
        "plan",
        help="fewest replicas and cheapest configuration within a service level",
        description="Find the fewest replicas of each configuration that keep the service level on this trace, and the "
        "cheapest of them. Flags that take A,B,... are swept over. Exit status 1: nothing keeps it.",
    )
    add_load_flags(plan)
    add_replica_flags(plan, is_sweep=True)
    group = plan.add_argument_group("question")
    group.add_argument("--slo", required=True, metavar="LIMITS", help="limits such as ttft_p99<1s,tpot_p99<50ms")
    group.add_argument("--max-replicas", type=positive, default=64, help="most that may be had")
    group.add_argument(
        "--max-refused", type=share_of_requests, default=0.0, help="share of requests that may be turned away or fail"
    )
    group.add_argument(
        "--capacity", action="store_true", help="instead: highest multiple of the load that --replicas take, to 1 %%"
    )
    group.add_argument("--replicas", type=positive, default=1, help="engines, for --capacity")
    group = plan.add_argument_group("search")
    group.add_argument("--jobs", type=positive, help="processes; default: one for each core. Changes no answer")
    group.add_argument(
        "--early-stop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end a simulation once it cannot keep the limits; changes no answer",
    )
    group.add_argument(
        "--prune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use closed-form bounds; changes no answer",
    )
    group.add_argument(
        "--diagnosis",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="simulate what binds, and what more of each thing would give",
    )
    _add_output(plan)
    plan.set_defaults(parser=plan)


def _add_trace(kinds: argparse._SubParsersAction[Parser]) -> None:
    trace = kinds.add_parser("trace", help="what a trace or synthetic load is like")
    add_load_flags(trace)
    trace.add_argument("--max-model-len", type=positive, help="for --context")
    trace.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else")
    trace.set_defaults(parser=trace)


def _add_calibrate(kinds: argparse._SubParsersAction[Parser]) -> None:
    calibrate = kinds.add_parser("calibrate", help="time this engine's steps on this machine, and fit a profile")
    add_calibrate_flags(calibrate)
    calibrate.set_defaults(parser=calibrate)


def _add_validate(kinds: argparse._SubParsersAction[Parser]) -> None:
    validate = kinds.add_parser("validate", help="simulated against measured requests, error for each percentile")
    add_validate_flags(validate)
    validate.set_defaults(parser=validate)


def _add_replay(kinds: argparse._SubParsersAction[Parser]) -> None:
    replay = kinds.add_parser("replay", help="run a journal again and compare every decision")
    replay.add_argument("journal", metavar="JOURNAL", help="folder of --journal, or one file in it")
    replay.add_argument("--until", type=int, metavar="STEP", help="stop after this step and show the state")
    replay.add_argument("--why", type=int, metavar="REQUEST", help="what kept this request waiting, step by step")
    replay.add_argument("--diff", metavar="OTHER", help="instead: the first message in which another journal differs")
    replay.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else")
    replay.set_defaults(parser=replay)


def _add_fuzz(kinds: argparse._SubParsersAction[Parser]) -> None:
    fuzz = kinds.add_parser("fuzz", help="hostile schedules and injected faults, from seeds")
    fuzz.add_argument("--seeds", type=positive, default=1000, help="how many")
    fuzz.add_argument("--seed", type=int, default=0, help="the first")
    fuzz.add_argument("--jobs", type=positive, help="processes; default: one for each core")
    fuzz.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else")
    fuzz.set_defaults(parser=fuzz)


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else")
    group.add_argument("--html", metavar="FILE", help="write a report with plots to this file")


def _sim(arguments: argparse.Namespace) -> int:
    """Import what was chosen, and do it."""
    match arguments.kind:
        case "run":
            from .run import sim_run as command
        case "plan":
            from .plan import sim_plan as command
        case "trace":
            from .trace import sim_trace as command
        case "calibrate":
            from .calibrate import sim_calibrate as command
        case "validate":
            from .validate import sim_validate as command
        case "replay":
            from .replay import sim_replay as command
        case "fuzz":
            from .fuzz import sim_fuzz as command
        case _:
            arguments.parser.print_help()
            return 0
    return command(arguments)
