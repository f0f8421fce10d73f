"""`octavo sim calibrate`: time the real engine's steps on this machine, and fit a step-time profile to them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..flag_values import positive
from ..flags import add_engine_flags


def add_calibrate_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the command; the engine's are those of `octavo serve`."""
    add_engine_flags(parser)
    group = parser.add_argument_group("calibration")
    group.add_argument("--seconds", type=positive, default=90, help="how long to measure; 60 to 120 is usual")
    group.add_argument("-o", "--out", default="profile.json", metavar="FILE", help="where to write the profile")
    group.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else")


def sim_calibrate(arguments: argparse.Namespace) -> int:
    """Measure, fit, write the profile, and say how well it fits steps it has not seen."""
    import asyncio

    import msgspec

    from ...actors.runtime.logs import configure_logs
    from ...sim.step_time.fitted import Profile, save_profile
    from ..config import make_config
    from ..flags import engine_fields
    from .live import calibrate
    from .progress import check_writable, progress_bar

    configure_logs("human")
    check_writable(arguments.out)  # now, not in ninety seconds
    out = Path(arguments.out)
    config = make_config(engine_fields(arguments))
    with progress_bar("calibrating", "%") as bar:
        profile: Profile = asyncio.run(
            calibrate(config, arguments.seconds, lambda share, text: bar.show(int(100 * share), 100, text))
        )
    save_profile(profile, out)
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(profile)).decode() + "\n")
        return 0
    _print(profile, out)
    return 0


def _print(profile: object, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from ...sim.step_time.fitted import Profile

    assert isinstance(profile, Profile)
    table = Table("steps", "held out", "mean error", "bias", title="error on steps the fit has not seen")
    for name, error in profile.errors.items():
        table.add_row(name, f"{error.num_samples:,}", f"{error.mape:.1%}", f"{error.bias:+.1%}")
    console = Console()
    console.print(table)
    console.print(f"{profile.num_samples:,} steps of {profile.meta.get('model', '')} measured; profile in {out}")
    console.print(f"use it: octavo sim run --profile {out} --trace ...", highlight=False, soft_wrap=True)
