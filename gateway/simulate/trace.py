"""`octavo sim trace`: what a trace or synthetic load is like."""

from __future__ import annotations

import argparse
import sys

import msgspec

from .load import Load, load_source


def sim_trace(arguments: argparse.Namespace) -> int:
    """Go through the load once and print its figures."""
    from ...sim.workload.summary import describe

    summary = describe(Load(load_source(arguments))(1.0))
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(summary)).decode() + "\n")
    else:
        from .tables import print_summary

        print_summary(summary)
    return 0
