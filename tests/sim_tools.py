"""Workloads and step-time models that tests of the simulator share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.sim.config import SimConfig
from octavo.sim.step_time.interface import StepShape
from octavo.sim.workload.request import TraceRequest, WorkloadCounts


@dataclass
class LinearModel:
    """A step costs so many ns in itself, for each token computed, and for each token of KV that is read."""

    step: int = 1_000_000
    token: int = 10_000
    kv: int = 10
    host: int = 0

    def step_ns(self, shape: StepShape) -> int:
        history = sum(new + before for new, before in shape.prefills)
        return self.step + self.token * shape.num_tokens + self.kv * (shape.decode_kv_tokens + history)

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> list[int]:
        return [self.step_ns(shape.after_decodes(i)) for i in range(num_steps)]

    def host_ns(self, shape: StepShape) -> int:
        return self.host

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        return 0

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "linear"}


@dataclass
class ListWorkload:
    """The requests of a list; `follow` says what an end sets off."""

    requests: Sequence[TraceRequest]
    follow: Callable[[TraceRequest, int], Sequence[TraceRequest]] = lambda request, ended_ns: ()
    has_shared_prefixes: bool = True
    name: str = "list"
    counts: WorkloadCounts = field(default_factory=WorkloadCounts)

    def arrivals(self) -> Iterator[TraceRequest]:
        return iter(self.requests)

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        return self.follow(request, ended_ns)


def small_config(**fields) -> SchedulerConfig:
    return SchedulerConfig(
        **{
            "num_blocks": 64,
            "block_size": 4,
            "max_model_len": 512,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 48,
            **fields,
        }
    )


def hostile_workload(seed: int, num_requests: int = 60) -> ListWorkload:
    """Bursts, shared prefixes, long and short, cancels and deadlines, priorities."""
    rng = random.Random(f"{seed}:workload")
    requests = []
    now = 0
    for i in range(num_requests):
        now += rng.choice([0, 0, 1_000_000, rng.randrange(40_000_000)])
        segments = []
        if rng.random() < 0.5:
            segments.append((rng.randrange(3), rng.randrange(1, 30)))
        segments.append((1000 + i, rng.randrange(1, 40)))
        requests.append(
            TraceRequest(
                arrival_ns=now,
                segments=tuple(segments),
                num_output_tokens=rng.choice([1, 2, rng.randrange(1, 20), rng.randrange(1, 150)]),
                answer_id=100_000 + i,
                priority=rng.choice([0, 0, 0, 1, -1]),
                tenant=rng.choice(["a", "b"]),
                cancel_after_ns=rng.choice([0, 0, 0, 0, rng.randrange(1, 200_000_000)]),
                timeout_ns=rng.choice([0, 0, 0, 0, rng.randrange(1, 400_000_000)]),
            )
        )
    return ListWorkload(requests)


def hostile_config(seed: int, **fields) -> SimConfig:
    rng = random.Random(f"{seed}:config")
    scheduler = small_config(
        num_blocks=rng.choice([45, 64, 200]),
        max_num_seqs=rng.choice([1, 3, 8, 20]),
        max_num_batched_tokens=rng.choice([5, 16, 48, 200]),
        pipeline_depth=rng.choice([1, 2, 2, 3]),
        enable_prefix_caching=rng.random() < 0.7,
        max_num_queued_requests=rng.choice([4, 100]),
        priority_aging_ns=rng.choice([0, 50_000_000, 10_000_000_000]),
        long_prefill_threshold=rng.choice([0, 0, 7]),
    )
    chosen = {
        "scheduler": scheduler,
        "num_replicas": rng.choice([1, 1, 2, 5]),
        "routing": rng.choice(["round_robin", "least_loaded", "prefix_aware"]),
        "ingress_ns": rng.choice([0, 300_000]),
        "egress_ns": rng.choice([0, 200_000]),
    }
    return SimConfig(**{**chosen, **fields})
