"""`octavo sim run`: one configuration on one trace."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...messages.errors import InvalidConfigError
from .engine import base_deployment, prices_of, sweep_of
from .load import Load, load_source
from .progress import check_writable, progress_bar

if TYPE_CHECKING:
    from ...sim.config import Outage
    from ...sim.results import RunResult
    from ...sim.simulation import Simulation

_NS = 1_000_000_000


def sim_run(arguments: argparse.Namespace) -> int:
    """Simulate, and print what was found."""
    check_writable(arguments.html, arguments.requests_out)
    simulation = simulate_flags(arguments)
    if arguments.requests_out:
        from ...sim.report.requests_csv import write_requests

        write_requests(Path(arguments.requests_out), simulation.records)
    if arguments.html:
        from ...sim.report.run_report import run_report

        Path(arguments.html).write_text(run_report(simulation.result, simulation.records), encoding="utf-8")
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(json_of(simulation.result))).decode() + "\n")
    else:
        from .tables import print_run

        print_run(simulation.result)
    return 0


def simulate_flags(arguments: argparse.Namespace) -> Simulation:
    """The simulation that the flags ask for."""
    from ...sim.config import SimConfig
    from ...sim.plan.simulated import Surroundings, deployment_of
    from ...sim.simulation import simulate
    from ...sim.slo import Slo, parse_slo

    slo = parse_slo(arguments.slo) if arguments.slo is not None else None
    candidate = next(iter(sweep_of(arguments).candidates()))
    surroundings = Surroundings(deployment=base_deployment(arguments), slo=slo or Slo(), prices=prices_of(arguments))
    resolved = deployment_of(candidate, surroundings).resolve()
    load = Load(load_source(arguments))
    try:
        config = SimConfig(
            scheduler=resolved.scheduler,
            num_replicas=arguments.replicas,
            routing=candidate.routing,
            ingress_ns=round(arguments.ingress_ms * 1e6),
            egress_ns=round(arguments.egress_ms * 1e6),
            outages=tuple(_outage(text) for text in arguments.outage),
            fast_forward=arguments.fast_forward,
            cost_per_replica_hour=resolved.cost_per_replica_hour,
        )
    except ValueError as error:
        raise InvalidConfigError(str(error)) from None
    workload = load(1.0)
    with progress_bar("simulating", "req") as bar:
        simulation = simulate(
            config,
            workload,
            resolved.step_time,
            slo=slo,
            progress=lambda ended, arrived, virtual_s: bar.show(
                ended, max(arrived, workload.counts.num_requests), f"{virtual_s:.0f} s simulated"
            ),
        )
    described = {
        "gpu": resolved.gpu.name,
        "model": resolved.model.name,
        "tensor_parallel_size": resolved.gpus_per_replica,
        **simulation.result.config,
        "num_blocks_estimated": resolved.memory.estimated,
    }
    result = msgspec.structs.replace(simulation.result, config=described)
    return msgspec.structs.replace(simulation, result=result)


def json_of(result: RunResult) -> dict[str, object]:
    """The result for programs: every field by its name; figures that do not exist (NaN) are null."""
    fields: dict[str, object] = msgspec.to_builtins(result)
    return fields


def _outage(text: str) -> Outage:
    from ...sim.config import Outage

    parts = text.split(":")
    try:
        replica, begin_s, end_s = int(parts[0]), float(parts[1]), float(parts[2])
        if len(parts) == 3:
            return Outage(replica, round(begin_s * _NS), round(end_s * _NS))
    except (ValueError, IndexError, OverflowError):
        pass
    raise InvalidConfigError(f"the outage {text!r} cannot be read: write REPLICA:BEGIN:END in seconds, 0:600:1200 say")
