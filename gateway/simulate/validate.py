"""`octavo sim validate`: simulated requests against measured ones, recorded or run now."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...messages.errors import InvalidConfigError
from ..flag_values import positive
from ..flags import add_engine_flags

if TYPE_CHECKING:
    from ...sim.validate import MetricError, Validation
    from .live import LiveComparison


def add_validate_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the command: `--requests` for a recorded run, `--trace` for one that is made now."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--profile", required=True, metavar="PATH", help="of octavo sim calibrate, or a folder of measured tables"
    )
    group.add_argument("--requests", metavar="FILE", help="a recorded run: JSON lines with what was measured")
    group.add_argument(
        "--trace", metavar="LOAD", help="run this on the real engine, several times, and simulate it: file or synthetic"
    )
    group.add_argument("--transform", action="append", default=[], metavar="NAME=VALUE", help="as in octavo sim run")
    group.add_argument("--limit", type=positive, help="first so many requests of --trace")
    group.add_argument("--load", type=float, default=0.7, help="share of time that the simulated device is to be busy")
    group.add_argument("--repeats", type=positive, default=5, help="runs of the real engine")
    group.add_argument("--num-fitted", type=int, help="requests of --requests that host overhead is fitted on")
    group.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else")
    add_engine_flags(parser)


def sim_validate(arguments: argparse.Namespace) -> int:
    """Print errors by figure and percentile.

    Raises:
        InvalidConfigError: neither or both of `--requests` and `--trace`.
    """
    import msgspec

    if (arguments.requests is None) == (arguments.trace is None):
        raise InvalidConfigError(
            "give --requests FILE for a recorded run, or --trace LOAD to make one now with the real engine"
        )
    result = _recorded(arguments) if arguments.requests else _live(arguments)
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")
    elif arguments.requests:
        _print_recorded(result)  # type: ignore[arg-type]  # made by _recorded
    else:
        _print_live(result)  # type: ignore[arg-type]  # made by _live
    return 0


def _recorded(arguments: argparse.Namespace) -> Validation:
    from ...sim.validate import validate
    from .progress import progress_bar

    with progress_bar("simulating", "req") as bar:
        return validate(
            Path(arguments.profile),
            Path(arguments.requests),
            num_fitted=arguments.num_fitted,
            progress=bar.show,
        )


def _live(arguments: argparse.Namespace) -> LiveComparison:
    import asyncio

    from ...actors.runtime.logs import configure_logs
    from ...sim.step_time.fitted import load_profile
    from ...sim.workload.spec import apply_transform, make_workload
    from ..config import make_config
    from ..flags import engine_fields
    from .live import compare_live
    from .progress import progress_bar

    if not 0 < arguments.load < 1:
        raise InvalidConfigError(f"--load {arguments.load} must lie between 0 and 1")
    configure_logs("human")
    workload = make_workload(arguments.trace, seed=arguments.seed)
    transforms = list(arguments.transform)
    if arguments.limit:
        transforms.insert(0, f"first={arguments.limit}")
    for transform in transforms:
        workload = apply_transform(workload, transform, seed=arguments.seed)
    profile = load_profile(Path(arguments.profile))
    with progress_bar("validating", "%") as bar:
        return asyncio.run(
            compare_live(
                make_config(engine_fields(arguments)),
                profile,
                workload,
                load=arguments.load,
                repeats=arguments.repeats,
                progress=lambda share, text: bar.show(int(100 * share), 100, text),
            )
        )


def _print_recorded(result: Validation) -> None:
    from rich.console import Console
    from rich.table import Table

    statistics = list(result.e2e.error)
    table = Table("simulated - measured", *statistics, title=f"{result.num_scored} requests of {result.requests}")
    rows: list[tuple[str, MetricError]] = [("TTFT", result.ttft), ("TPOT", result.tpot), ("end to end", result.e2e)]
    for name, metric in rows:
        table.add_row(name, *(f"{metric.error[statistic]:+.1%}" for statistic in statistics))
    console = Console()
    console.print(table)
    console.print(f"overhead in each step, fitted on the first {result.num_fitted} requests: {result.overhead}")
    if result.extrapolated_share:
        console.print(f"[yellow]{result.extrapolated_share:.1%} of steps lie outside what was measured[/]")


def _print_live(result: LiveComparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "simulated", "measured", "error", "spread of real runs", title=f"{len(result.real)} runs of the real engine"
    )
    for name, error in result.errors.items():
        measured = sorted(getattr(figures, name) for figures in result.real)[len(result.real) // 2]
        unit, scale = ("tok/s", 1.0) if name.endswith("rate") else ("ms", 1e3)
        table.add_row(
            name,
            f"{getattr(result.simulated, name) * scale:.2f} {unit}",
            f"{measured * scale:.2f} {unit}",
            f"{error:+.1%}",
            f"{result.spread[name]:.1%}",
        )
    console = Console()
    console.print(table)
    console.print(f"the simulated device was busy {result.busy_share:.0%} of the time; measured: median of the runs")
