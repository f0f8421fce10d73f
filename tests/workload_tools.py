"""Small workloads for the tests of their transforms."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from octavo.sim.workload.content_ids import FIRST_PRIVATE_ID
from octavo.sim.workload.request import TraceRequest, Workload, WorkloadCounts
from octavo.sim.workload.spec import make_workload

SECOND = 1_000_000_000

SHAPES = (
    "synthetic:poisson,rate=5,n=60,prompt=lognormal:300:0.8,output=uniform:1:50,seed=3",
    "synthetic:poisson,rate=5,n=40,groups=3,group_tokens=70,prompt=uniform:1:99,output=5",
    "synthetic:gamma,rate=2,cv=2,n=20,turns=uniform:1:4,think=exponential:2,followup=9,prompt=50,output=7",
    "synthetic:closed,concurrency=3,n=20,think=1,turns=uniform:1:2,output=3",
    "synthetic:bursts,rate=5,on=2,off=5,duration=20",
)


class Recorded:
    """Requests by hand."""

    def __init__(self, *rows: tuple[int, tuple[tuple[int, int], ...], int], session: int = -1) -> None:
        self.name = "recorded"
        self.counts = WorkloadCounts(num_rows=len(rows), num_requests=len(rows))
        self.has_shared_prefixes = True
        self.requests = [
            TraceRequest(arrival, segments, num_output, FIRST_PRIVATE_ID + place, session=session)
            for place, (arrival, segments, num_output) in enumerate(rows)
        ]

    def arrivals(self) -> Iterator[TraceRequest]:
        return iter(self.requests)

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        return ()


def served(workload: Workload, service_ns: int = SECOND) -> list[TraceRequest]:
    """All requests, each one's end `service_ns` after its arrival, in order of arrival."""
    agenda = [(r.arrival_ns, place, r) for place, r in enumerate(workload.arrivals())]
    heapq.heapify(agenda)
    done, sequence = [], len(agenda)
    while agenda:
        time_ns, _, request = heapq.heappop(agenda)
        done.append(request)
        for follower in workload.followers(request, time_ns + service_ns):
            assert follower.arrival_ns >= time_ns + service_ns
            sequence += 1
            heapq.heappush(agenda, (follower.arrival_ns, sequence, follower))
    return done


def shape(index: int) -> Workload:
    return make_workload(SHAPES[index % len(SHAPES)])
