"""What is simulated: how many replicas, how each is set, and how requests reach them."""

from __future__ import annotations

import msgspec

from ..actors.router.config import RoutingPolicy
from ..actors.scheduler.config import SchedulerConfig

__all__ = ["MAX_OUTAGE_NS", "MAX_REPLICAS", "MAX_TRANSIT_NS", "Outage", "RoutingPolicy", "SimConfig"]

MAX_REPLICAS = 100_000
MAX_TRANSIT_NS = 3600 * 10**9
"""An hour: no request takes longer to reach the scheduler, nor a token to reach its client."""

MAX_OUTAGE_NS = 10**9 * 10**9
"""Thirty years: nothing of a simulation lies beyond."""


class Outage(msgspec.Struct, frozen=True):
    """A replica that is lost for a while: its requests go on, with the tokens they have, once it is back.

    Attributes:
        replica: which, from 0.
        begin_ns, end_ns: virtual time.
    """

    replica: int
    begin_ns: int
    end_ns: int


class SimConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration of a cluster of equal replicas.

    Attributes:
        scheduler: of each replica, block count resolved; the engine's own struct, checked by the engine's own code.
        num_replicas: engines behind the router.
        routing: the router's policy.
        ingress_ns: from the client's arrival at the gateway to the scheduler (HTTP, tokenizer).
        egress_ns: from a step's end to the client (detokenizer, HTTP).
        outages: replicas lost for a while.
        fast_forward: skip over stretches of pure decode; changes no result, only how fast it is found.
        cost_per_replica_hour: money.
    """

    scheduler: SchedulerConfig
    num_replicas: int = 1
    routing: RoutingPolicy = "least_loaded"
    ingress_ns: int = 0
    egress_ns: int = 0
    outages: tuple[Outage, ...] = ()
    fast_forward: bool = True
    cost_per_replica_hour: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_replicas <= MAX_REPLICAS:
            raise ValueError(f"num_replicas={self.num_replicas} must be from 1 to {MAX_REPLICAS}")
        for name in ("ingress_ns", "egress_ns"):
            if not 0 <= getattr(self, name) <= MAX_TRANSIT_NS:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to {MAX_TRANSIT_NS}, an hour")
        for outage in self.outages:
            is_somebodys = 0 <= outage.replica < self.num_replicas
            if not is_somebodys or not 0 <= outage.begin_ns < outage.end_ns <= MAX_OUTAGE_NS:
                raise ValueError(
                    f"an outage is of one of {self.num_replicas} replicas, counted from 0, and ends after it begins "
                    f"and within {MAX_OUTAGE_NS // 10**9} s: not of replica {outage.replica} from "
                    f"{outage.begin_ns / 1e9:.6g} s to {outage.end_ns / 1e9:.6g} s"
                )
