"""The simulator against queueing theory: `python -m octavo.sim.queueing`.

A replica with one seat whose steps take as long as their prompt is a queue with one server; a replica with c seats
whose steps take one tick, and whose answers have a geometric number of tokens, is one with c.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

from ..actors.scheduler.config import SchedulerConfig
from .config import SimConfig
from .simulation import simulate
from .step_time.interface import StepShape
from .workload.request import TraceRequest, WorkloadCounts

Service = Literal["exponential", "constant"]

_QUEUES: dict[str, tuple[Service, int]] = {
    "M/M/1": ("exponential", 1),
    "M/D/1": ("constant", 1),
    "M/M/4": ("exponential", 4),
}

_NS_PER_TOKEN = 1_000
_MEAN_PROMPT = 2_000
_MEAN_TICKS = 1_000  # a customer waits for the next tick, and a seat is free one tick late: 0.15 % of a service time
_TICK_NS = 1_000


def mean_wait_by_theory(service: Service, num_servers: int, rho: float) -> float:
    """Mean wait in the queue, in mean service times.

    Source: Pollaczek-Khinchine for one server; Erlang C (M/M/c) for several exponential ones.
    """
    if num_servers == 1:
        return rho / (1 - rho) * (1.0 if service == "exponential" else 0.5)
    assert service == "exponential", "there is no closed form for M/D/c"
    offered = num_servers * rho
    terms = [offered**k / math.factorial(k) for k in range(num_servers)]
    last = offered**num_servers / math.factorial(num_servers) / (1 - rho)
    return last / (sum(terms) + last) / (num_servers * (1 - rho))


class _PromptTime:
    """A step takes as long as its prompts are; decoding takes one tick."""

    def step_ns(self, shape: StepShape) -> int:
        return _NS_PER_TOKEN * sum(num_new for num_new, _ in shape.prefills) or _TICK_NS

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> Sequence[int]:
        return [self.step_ns(shape)] * num_steps

    def host_ns(self, shape: StepShape) -> int:
        return 0

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        return 0

    def describe(self) -> dict[str, str | int | float]:
        return {"kind": "queueing"}


class _TickTime(_PromptTime):
    """Every step takes one tick."""

    def step_ns(self, shape: StepShape) -> int:
        return _TICK_NS


class _Customers:
    """Poisson arrivals; the service time is a prompt's length, or an answer's.

    Args:
        num_servers: 1: by the prompt; more: by the answer.
    """

    def __init__(self, service: Service, num_servers: int, rho: float, num_requests: int, seed: int) -> None:
        self._service = service
        self._is_one = num_servers == 1
        mean_ns = _MEAN_PROMPT * _NS_PER_TOKEN if self._is_one else _MEAN_TICKS * _TICK_NS
        self._mean_gap_ns = mean_ns / (rho * num_servers)
        self._num_requests = num_requests
        self._seed = seed
        self.name = f"{service} service, {num_servers} servers, rho {rho}"
        self.counts = WorkloadCounts()
        self.has_shared_prefixes = False
        self.total_service = 0

    def arrivals(self) -> Iterator[TraceRequest]:
        gaps = random.Random(f"{self._seed}:gaps")  # noqa: S311 (a workload, not a secret)
        services = random.Random(f"{self._seed}:services")  # noqa: S311
        now = 0.0
        for i in range(self._num_requests):
            now += gaps.expovariate(1 / self._mean_gap_ns)
            if self._is_one:
                constant, mean = _MEAN_PROMPT, float(_MEAN_PROMPT)
            else:
                constant, mean = _MEAN_TICKS, float(_MEAN_TICKS)
            length = constant if self._service == "constant" else max(1, round(services.expovariate(1 / mean)))
            self.total_service += length
            prompt, output = (length, 1) if self._is_one else (1, length)
            yield TraceRequest(round(now), ((i % 2**31, prompt),), output, 0)

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        return ()


def simulate_queue(
    service: Service, num_servers: int, rho: float, num_requests: int, *, seed: int = 0
) -> tuple[float, float]:
    """Mean wait before service and mean service time of a simulated queue, both in ns."""
    customers = _Customers(service, num_servers, rho, num_requests, seed)
    scheduler = SchedulerConfig(
        num_blocks=1 << 16,
        block_size=256,
        max_model_len=1 << 20,
        max_num_seqs=num_servers,
        max_num_batched_tokens=1 << 20,
        pipeline_depth=1,
        enable_prefix_caching=False,
        max_num_queued_requests=1 << 30,
        max_num_queued_tokens=1 << 40,
    )
    model = _PromptTime() if num_servers == 1 else _TickTime()
    simulation = simulate(SimConfig(scheduler=scheduler), customers, model)
    waits = math.fsum(record.scheduled_ns - record.arrival_ns for record in simulation.records)
    unit_ns = _NS_PER_TOKEN if num_servers == 1 else _TICK_NS
    return waits / num_requests, customers.total_service * unit_ns / num_requests


def main(argv: list[str] | None = None) -> int:
    """Print mean waits beside theory's."""
    parser = argparse.ArgumentParser(prog="python -m octavo.sim.queueing", description=__doc__)
    parser.add_argument("--num-requests", type=int, default=1_000_000)
    parser.add_argument("--rho", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--queues", nargs="+", choices=_QUEUES, default=list(_QUEUES))
    args = parser.parse_args(argv)
    print("queue   rho  simulated  theory   error   (mean wait, in service times)")
    for name in args.queues:
        service, num_servers = _QUEUES[name]
        for rho in args.rho:
            num_requests = args.num_requests if num_servers == 1 else args.num_requests // 2
            wait, mean = simulate_queue(service, num_servers, rho, num_requests)
            theory = mean_wait_by_theory(service, num_servers, rho)
            print(f"{name}  {rho:5.2f} {wait / mean:10.4f} {theory:7.4f} {wait / mean / theory - 1:+7.2%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
