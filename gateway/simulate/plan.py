"""`octavo sim plan`: fewest replicas, cheapest configuration, or highest load, within a service level."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...messages.errors import InvalidConfigError
from ..host import usable_cores
from .engine import base_deployment, prices_of, sweep_of
from .load import Load, LoadSource, load_source
from .progress import Bar, check_writable, progress_bar
from .serve_command import serve_command

if TYPE_CHECKING:
    from ...sim.plan.capacity import Capacity
    from ...sim.plan.planner import Finding, Plan, Question
    from ...sim.plan.probe import Prober
    from ...sim.plan.simulated import Surroundings

INFEASIBLE = 1  # exit status of a question whose answer is no


class MakeProber(msgspec.Struct, frozen=True, kw_only=True):
    """Builds a prober, here or in another process."""

    surroundings: Surroundings
    source: LoadSource

    def __call__(self) -> Prober:
        """Read the trace, and be ready to simulate."""
        from ...sim.plan.simulated import SimulatedProber

        load = Load(self.source)
        return SimulatedProber(self.surroundings, load, has_followers=load.has_followers)


def sim_plan(arguments: argparse.Namespace) -> int:
    """Plan, print, and say by the exit status whether there is an answer."""
    from ...sim.plan.planner import Question, plan
    from ...sim.plan.simulated import Surroundings
    from ...sim.slo import parse_slo

    check_writable(arguments.html)
    slo = parse_slo(arguments.slo)
    question = Question(
        slo=slo,
        max_replicas=arguments.max_replicas,
        max_refused=arguments.max_refused,
        stop_early=arguments.early_stop,
        prune=arguments.prune,
    )
    surroundings = Surroundings(
        deployment=base_deployment(arguments),
        slo=slo,
        max_refused=arguments.max_refused,
        ingress_ns=round(arguments.ingress_ms * 1e6),
        egress_ns=round(arguments.egress_ms * 1e6),
        prices=prices_of(arguments),
    )
    candidates = list(sweep_of(arguments).candidates())
    make_prober = MakeProber(surroundings=surroundings, source=load_source(arguments))
    if arguments.capacity:
        return _capacity(arguments, make_prober, question)
    Load(make_prober.source)  # what is wrong with the trace is said here, not by another process
    jobs = arguments.jobs or usable_cores()
    with progress_bar("planning", "candidate") as bar:
        found = plan(
            candidates,
            make_prober,
            question,
            jobs=jobs,
            with_diagnosis=arguments.diagnosis,
            with_curve=bool(arguments.html),
            progress=bar.show,
        )
    command, remarks = "", _remarks(found)
    if found.chosen >= 0:
        command, left_out = serve_command(found.findings[found.chosen], arguments)
        remarks += left_out
    if arguments.html:
        from ...sim.report.plan_report import plan_report

        title = f"Plan for {Path(arguments.trace).name}"
        page = plan_report(found, slo, title=title, serve_command=command, remarks=remarks)
        Path(arguments.html).write_text(page, encoding="utf-8")
    if arguments.json:
        _print_json(plan_json(found, arguments, command, remarks))
    else:
        from .tables import print_plan

        print_plan(found, serve_command=command, remarks=remarks)
    return 0 if found.chosen >= 0 else INFEASIBLE


def _capacity(arguments: argparse.Namespace, make_prober: MakeProber, question: Question) -> int:
    from ...sim.plan.capacity import capacity

    candidates = list(sweep_of(arguments).candidates())
    if len(candidates) > 1:
        raise InvalidConfigError("--capacity is of one configuration: give one value of each flag", field="capacity")
    prober = make_prober()
    with progress_bar("searching", "load") as bar:
        found = capacity(
            candidates[0],
            arguments.replicas,
            prober,
            question,
            with_diagnosis=arguments.diagnosis,
            progress=_Counter(bar),
        )
    if arguments.html:
        from ...sim.report.plan_report import capacity_report

        page = capacity_report(found, question.slo, title=f"Capacity for {Path(arguments.trace).name}")
        Path(arguments.html).write_text(page, encoding="utf-8")
    if arguments.json:
        _print_json(capacity_json(found, arguments))
    else:
        from .tables import print_capacity

        print_capacity(found, _capacity_remarks(found))
    return 0 if found.best is not None else INFEASIBLE


class _Counter:
    """Counts what is told to a bar whose end nobody knows."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._count = 0

    def __call__(self, text: str) -> None:
        self._count += 1
        self._bar.show(self._count, 0, text)


def plan_json(plan: Plan, arguments: argparse.Namespace, command: str, remarks: list[str]) -> dict[str, object]:
    """The plan for programs; `command` starts one replica of what was chosen."""
    chosen = plan.findings[plan.chosen] if plan.chosen >= 0 else None
    return {
        "schema_version": 1,
        "trace": arguments.trace,
        "slo": arguments.slo,
        "feasible": chosen is not None,
        "chosen": None if chosen is None else {**finding_json(chosen), "serve_command": command},
        "candidates": [finding_json(finding) for finding in plan.findings],
        "pareto_front": [{"candidate": index, "num_replicas": number} for index, number in plan.front],
        "diagnosis": msgspec.to_builtins(plan.diagnosis),
        "curve": msgspec.to_builtins(plan.curve),
        "remarks": remarks,
    }


def finding_json(finding: Finding) -> dict[str, object]:
    """One candidate for programs."""
    return {
        "candidate": msgspec.to_builtins(finding.candidate),
        "verdict": finding.verdict,
        "num_replicas": finding.num_replicas,
        "num_gpus": finding.num_gpus,
        "cost_per_hour": finding.cost_per_hour if finding.verdict == "feasible" else None,
        "binding": finding.binding,
        "reason": finding.reason,
        "num_probes": finding.num_probes,
        "replica": msgspec.to_builtins(finding.replica),
        "result": msgspec.to_builtins(finding.best),
    }


def capacity_json(found: Capacity, arguments: argparse.Namespace) -> dict[str, object]:
    """The capacity for programs."""
    return {
        "schema_version": 1,
        "trace": arguments.trace,
        "slo": arguments.slo,
        "feasible": found.best is not None,
        **msgspec.to_builtins(found),
        "remarks": _capacity_remarks(found),
    }


def _remarks(plan: Plan) -> list[str]:
    """What must be known beside the chosen row."""
    from ...sim.report.run_report import overload_remark

    if plan.chosen < 0:
        return []
    best = plan.findings[plan.chosen].best
    assert best is not None
    remarks = []
    if best.load != "STABLE":
        remarks.append(f"the chosen configuration is {overload_remark(best.load)}")
    if best.extrapolated_share:
        remarks.append(
            f"{best.extrapolated_share:.1%} of its steps lie outside what the step-time model was measured on"
        )
    return remarks


def _capacity_remarks(found: Capacity) -> list[str]:
    from ...sim.report.run_report import overload_remark

    if found.best is None or found.best.load == "STABLE":
        return []
    return [f"at this load the cluster is {overload_remark(found.best.load)}"]


def _print_json(fields: dict[str, object]) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(fields)).decode() + "\n")
