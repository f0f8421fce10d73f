"""What is simulated: how many replicas, how each is set, and how requests reach them."""

from __future__ import annotations

import msgspec

from ..actors.router.config import RoutingPolicy
from ..actors.scheduler.config import SchedulerConfig

__all__ = ["Outage", "RoutingPolicy", "SimConfig"]


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
        if self.num_replicas < 1:
            raise ValueError(f"num_replicas={self.num_replicas} must be at least 1")
        for name in ("ingress_ns", "egress_ns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for outage in self.outages:
            if not 0 <= outage.replica < self.num_replicas or not 0 <= outage.begin_ns < outage.end_ns:
                raise ValueError(f"{outage} must name one of {self.num_replicas} replicas and end after it begins")
