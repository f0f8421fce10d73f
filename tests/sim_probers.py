"""Probers for tests of the planner: one that simulates small loads, and one that only computes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octavo.sim.deployment import Deployment
from octavo.sim.plan.candidate import Candidate
from octavo.sim.plan.probe import Ask, CannotBootError, Probe, Replica
from octavo.sim.plan.simulated import SimulatedProber, Surroundings
from octavo.sim.results import Distribution
from octavo.sim.slo import parse_slo
from octavo.sim.step_time.interface import StepShape, StepTimeModel
from octavo.sim.workload.request import Workload
from octavo.sim.workload.spec import apply_transform, make_workload


class MakeSimulated(msgspec.Struct, frozen=True):
    """Builds a prober that simulates; plain values, so that it reaches other processes."""

    trace: str
    slo: str
    max_refused: float = 0.0

    def __call__(self) -> SimulatedProber:
        base = make_workload(self.trace)

        def at(multiple: float) -> Workload:
            return base if multiple == 1.0 else apply_transform(base, f"rate={multiple!r}")

        surroundings = Surroundings(deployment=Deployment(), slo=parse_slo(self.slo), max_refused=self.max_refused)
        has_followers = "closed" in self.trace or "turns=" in self.trace
        return SimulatedProber(surroundings, at, has_followers=has_followers)


class ConstantModel:
    """Every step takes the same time for each token."""

    def __init__(self, ns_per_token: int) -> None:
        self._ns = ns_per_token

    def step_ns(self, shape: StepShape) -> int:
        return max(1, self._ns * shape.num_tokens)

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> Sequence[int]:
        return [self.step_ns(shape)] * num_steps

    def host_ns(self, shape: StepShape) -> int:
        return 7

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        return 0

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "constant"}


def make_probe(meets: bool, *, num_replicas: int = 1, load_multiple: float = 1.0, cost: float = 1.0) -> Probe:
    """A simulation's figures, all alike."""
    figures = Distribution(0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    return Probe(
        num_replicas=num_replicas,
        load_multiple=load_multiple,
        meets=meets,
        missed=() if meets else ("ttft_p99",),
        is_complete=True,
        load="STABLE",
        ttft_s=figures,
        tpot_s=figures,
        e2e_s=figures,
        queue_s=figures,
        slo_attainment=1.0 if meets else 0.5,
        goodput_rps=1.0,
        refused_share=0.0,
        kv_use_peak=0.5,
        busy_share=0.5,
        mean_batch=4.0,
        num_preemptions=0,
        prefix_hit_rate=0.0,
        extrapolated_share=0.0,
        cost_per_hour=cost * num_replicas,
        event_log_sha256="",
    )


class ComputedProber:
    """Meets the limits when `num_replicas >= needed[gpu] * load`; a GPU without an entry does not boot."""

    may_share_prefixes = False
    has_all_demands = True

    def __init__(self, needed: dict[str, float], prices: dict[str, float]) -> None:
        self.needed = needed
        self.prices = prices
        self.asks: list[Ask] = []

    def replica(self, candidate: Candidate) -> Replica:
        if candidate.gpu not in self.needed:
            raise CannotBootError(f"{candidate.gpu} has no memory")
        return Replica(
            num_blocks=100,
            block_size=16,
            max_sequence_len=1600,
            num_gpus=candidate.tensor_parallel_size,
            cost_per_hour=self.prices[candidate.gpu],
        )

    def model(self, candidate: Candidate) -> StepTimeModel:
        return ConstantModel(1)

    def demands(self) -> list[tuple[int, int, int]]:
        return [(0, 10, 10), (1_000_000_000, 10, 10)]

    def probe(self, ask: Ask) -> Probe:
        self.asks.append(ask)
        needed = self.needed[ask.candidate.gpu] * ask.load_multiple
        if ask.relaxation == "prefill compute":
            needed /= 2
        return make_probe(
            ask.num_replicas >= needed,
            num_replicas=ask.num_replicas,
            load_multiple=ask.load_multiple,
            cost=self.prices[ask.candidate.gpu],
        )
