"""Probes by simulation: the port that the planner asks, on the engine's own cores."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ...messages.errors import OctavoError
from ..config import SimConfig
from ..deployment import Deployment, ResolvedDeployment
from ..simulation import Simulation, simulate
from ..slo import Slo
from ..step_time.interface import StepTimeModel
from ..workload.request import Workload
from .candidate import Candidate
from .probe import Ask, CannotBootError, Probe, Replica, judge
from .relax import relaxed_config, relaxed_model

Open = Callable[[float], Workload]
"""Makes the workload at a multiple of its load; equal calls make equal workloads."""


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What all candidates have in common.

    Attributes:
        deployment: model, prices and settings that are not swept.
        slo: limits.
        max_refused: share of requests that may be turned away.
        ingress_ns, egress_ns: between client and scheduler.
        prices: dollars an hour by GPU, instead of the table's.
    """

    deployment: Deployment
    slo: Slo
    max_refused: float = 0.0
    ingress_ns: int = 0
    egress_ns: int = 0
    prices: dict[str, float] = {}


class SimulatedProber:
    """Simulates candidates, and remembers what it found.

    Args:
        surroundings: what all candidates have in common.
        open_workload: the load.
        has_followers: whether requests set off others, so that not all of them are known beforehand.
    """

    def __init__(self, surroundings: Surroundings, open_workload: Open, *, has_followers: bool) -> None:
        self._surroundings = surroundings
        self._open_workload = open_workload
        self._has_followers = has_followers
        self._resolved: dict[Candidate, ResolvedDeployment] = {}
        self._probes: dict[Ask, Probe] = {}
        self._demands: list[tuple[int, int, int]] | None = None
        self._may_share = False

    def replica(self, candidate: Candidate) -> Replica:
        """See `Prober`."""
        resolved = self._resolve(candidate)
        return Replica(
            num_blocks=resolved.scheduler.num_blocks,
            block_size=resolved.scheduler.block_size,
            max_sequence_len=resolved.scheduler.max_sequence_len,
            num_gpus=resolved.gpus_per_replica,
            cost_per_hour=resolved.cost_per_replica_hour,
        )

    def model(self, candidate: Candidate) -> StepTimeModel:
        """See `Prober`."""
        return self._resolve(candidate).step_time

    def demands(self) -> list[tuple[int, int, int]]:
        """See `Prober`."""
        if self._demands is None:
            workload = self._open_workload(1.0)
            self._may_share = workload.has_shared_prefixes
            self._demands = [
                (request.arrival_ns, request.num_prompt_tokens, request.num_output_tokens)
                for request in workload.arrivals()
            ]
        return self._demands

    @property
    def may_share_prefixes(self) -> bool:
        """See `Prober`."""
        self.demands()
        return self._may_share

    @property
    def has_all_demands(self) -> bool:
        """See `Prober`."""
        return not self._has_followers

    def probe(self, ask: Ask) -> Probe:
        """See `Prober`."""
        key = msgspec.structs.replace(ask, stop_early=False)
        known = self._probes.get(key)
        if known is not None and (known.is_complete or ask.stop_early):
            return known
        simulation = self.simulate(ask)
        self._probes[key] = judge(
            simulation.result,
            self._surroundings.slo,
            max_refused=self._surroundings.max_refused,
            load_multiple=ask.load_multiple,
            is_complete=not simulation.is_cut_short,
        )
        return self._probes[key]

    def simulate(self, ask: Ask) -> Simulation:
        """The whole simulation behind a probe."""
        resolved = self._resolve(ask.candidate)
        scheduler, model = resolved.scheduler, resolved.step_time
        if ask.relaxation is not None:
            scheduler, model = relaxed_config(scheduler, ask.relaxation), relaxed_model(model, ask.relaxation)
        config = SimConfig(
            scheduler=scheduler,
            num_replicas=ask.num_replicas,
            routing=ask.candidate.routing,
            ingress_ns=self._surroundings.ingress_ns,
            egress_ns=self._surroundings.egress_ns,
            cost_per_replica_hour=resolved.cost_per_replica_hour,
        )
        return simulate(
            config,
            self._open_workload(ask.load_multiple),
            model,
            slo=self._surroundings.slo,
            # a request that is not known yet cannot be counted among those that may miss
            stop_early=ask.stop_early and not self._has_followers,
        )

    def _resolve(self, candidate: Candidate) -> ResolvedDeployment:
        if candidate not in self._resolved:
            try:
                self._resolved[candidate] = deployment_of(candidate, self._surroundings).resolve()
            except OctavoError as error:
                raise CannotBootError(str(error)) from error
        return self._resolved[candidate]


def deployment_of(candidate: Candidate, surroundings: Surroundings) -> Deployment:
    """The candidate as the engine would be started."""
    return msgspec.structs.replace(
        surroundings.deployment,
        gpu=candidate.gpu,
        tp=candidate.tensor_parallel_size,
        max_num_batched_tokens=candidate.max_num_batched_tokens,
        max_num_seqs=candidate.max_num_seqs,
        block_size=candidate.block_size,
        enable_prefix_caching=candidate.enable_prefix_caching,
        memory_utilization=candidate.memory_utilization,
        num_blocks=candidate.num_blocks,
        gpu_hour=surroundings.prices.get(candidate.gpu, surroundings.deployment.gpu_hour),
    )
