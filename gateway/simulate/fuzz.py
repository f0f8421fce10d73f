"""`octavo sim fuzz`: hostile schedules and injected faults, from seeds."""

from __future__ import annotations

import argparse
import sys

import msgspec

from ...messages.errors import InvalidConfigError
from ..host import usable_cores
from .progress import progress_bar

VIOLATED = 1  # exit status of a run that found a violated invariant


def sim_fuzz(arguments: argparse.Namespace) -> int:
    """Run the seeds; status 1 says that one of them fails."""
    from ...sim.faults.fuzz import fuzz

    if arguments.seed < 0:
        raise InvalidConfigError(f"--seed is {arguments.seed}, but must be from 0 up", field="seed")
    with progress_bar("fuzzing", "seed") as bar:
        report = fuzz(
            arguments.seeds,
            arguments.seed,
            arguments.jobs or usable_cores(),
            progress=lambda done: bar.show(done, arguments.seeds),
        )
    if arguments.json:
        fields: dict[str, object] = {
            "schema_version": 1,
            "first_seed": report.first_seed,
            "num_seeds": report.num_seeds,
            "num_events": report.num_events,
            "hash": report.hash,
            "failure": None,
        }
        if report.failure is not None:
            one = report.failure
            fields["failure"] = {
                "seed": one.seed,
                "kind": one.kind,
                "detail": one.detail,
                "events": list(one.events),
                "waits": list(one.waits),
                "command": one.command,
            }
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(fields)).decode() + "\n")
    else:
        print(report.text())
    return 0 if report.failure is None else VIOLATED
