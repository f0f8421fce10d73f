"""A workload run to its end under virtual time, and its figures."""

from __future__ import annotations

import gc
from collections.abc import Callable

import msgspec

from .cluster import Cluster
from .config import SimConfig
from .guard import Guard, no_real_world, real_world
from .metrics import summarize
from .results import RequestRecord, RunResult
from .slo import Slo
from .slo_watch import SloWatch
from .step_time.interface import StepTimeModel
from .workload.request import Workload

Progress = Callable[[int, int, float], None]
"""Called now and then with requests ended, requests arrived, and virtual seconds."""

_REPORT_EVERY = 64


class Simulation(msgspec.Struct, frozen=True):
    """A finished run.

    Attributes:
        result: its summary.
        records: what became of each request, in order of arrival.
        is_cut_short: the run was ended because it could no longer meet its service level.
    """

    result: RunResult
    records: list[RequestRecord]
    is_cut_short: bool = False


def simulate(
    config: SimConfig,
    workload: Workload,
    model: StepTimeModel,
    *,
    slo: Slo | None = None,
    progress: Progress | None = None,
    stop_early: bool = False,
) -> Simulation:
    """Run a workload to its end, under virtual time.

    While it runs, reading a clock, global chance, starting a thread or opening a socket raises `RealWorldError`.

    Args:
        config: the cluster.
        workload: what arrives; its `followers` may add to it.
        model: how long steps take.
        slo: for goodput and the verdict.
        progress: told how far the run is; the real world is open to it.
        stop_early: end the run once it cannot meet the service level; needs a workload without followers.

    Returns:
        The same result for the same arguments, whatever else the machine does.
    """
    watch = None
    if stop_early and slo is not None:
        watch = SloWatch(slo, sum(1 for _ in workload.arrivals()))
    was_collecting = gc.isenabled()
    gc.disable()  # nothing here makes circles; the collector would walk all requests again and again
    try:
        with no_real_world() as guard:
            cluster = Cluster(config, workload, model, watch)
            _run(cluster, guard, progress)
    finally:
        if was_collecting:
            gc.enable()
    result = summarize(config, workload, model, cluster, slo)
    return Simulation(result, cluster.records, cluster.is_lost)


def _run(cluster: Cluster, guard: Guard, progress: Progress | None) -> None:
    run_next = cluster.agenda.run_next
    report_at = _REPORT_EVERY
    while not cluster.is_done and not cluster.is_lost:
        if not run_next():
            raise RuntimeError(f"{len(cluster.records) - cluster.num_ended} requests wait, and nothing will happen")
        if progress is not None and cluster.num_ended >= report_at:
            report_at = cluster.num_ended + _REPORT_EVERY
            with real_world(guard):
                progress(cluster.num_ended, len(cluster.records), cluster.agenda.now_ns / 1e9)
