"""What a workload is like, before anything serves it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from ...actors.runtime.percentile import percentile
from .request import TraceRequest, Workload, WorkloadCounts

_MINUTE_NS = 60 * 1_000_000_000


class LengthSummary(msgspec.Struct, frozen=True):
    """Tokens over requests; percentiles by nearest rank (the smallest value that at least p % do not exceed)."""

    total: int
    mean: float
    min: int
    p50: int
    p90: int
    p99: int
    max: int


class WorkloadSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a workload as offered to servers without latency (each follower comes upon its predecessor at once).

    Attributes:
        span_s: first to last arrival.
        request_rate: requests a second over the span.
        busiest_minute_requests, busiest_minute_begin_s: the 60 s with most arrivals; their begin from time 0.
        num_sessions: conversations; requests without one are not counted.
        shareable_prompt_share: prompt tokens that an earlier prompt began with, of all: what an unlimited prefix cache
            could save.
    """

    name: str
    num_requests: int
    span_s: float
    request_rate: float
    busiest_minute_requests: int
    busiest_minute_begin_s: float
    num_sessions: int
    tenants: dict[str, int]
    prompt: LengthSummary
    output: LengthSummary
    shareable_prompt_share: float
    counts: WorkloadCounts


def describe(workload: Workload) -> WorkloadSummary:
    """Go through the workload once.

    Memory grows with the number of requests and of distinct blocks, not with that of tokens.
    """
    prompts: list[int] = []
    outputs: list[int] = []
    tenants: dict[str, int] = {}
    sessions: dict[int, None] = {}
    recent: deque[int] = deque()
    busiest, busiest_begin_ns = 0, 0
    first_ns = last_ns = 0
    prefixes = _Prefixes()
    num_shareable = 0
    for request in _served_at_once(workload):
        last_ns = request.arrival_ns
        first_ns = first_ns if prompts else last_ns
        recent.append(last_ns)
        while recent[0] <= last_ns - _MINUTE_NS:
            recent.popleft()
        if len(recent) > busiest:
            busiest, busiest_begin_ns = len(recent), recent[0]
        prompts.append(request.num_prompt_tokens)
        outputs.append(request.num_output_tokens)
        if request.tenant:
            tenants[request.tenant] = tenants.get(request.tenant, 0) + 1
        if request.session >= 0:
            sessions[request.session] = None
        if workload.has_shared_prefixes:
            num_shareable += prefixes.add(request.segments)
    span_s = (last_ns - first_ns) / 1e9
    prompt = _lengths(prompts)
    return WorkloadSummary(
        name=workload.name,
        num_requests=len(prompts),
        span_s=span_s,
        request_rate=len(prompts) / span_s if span_s else 0.0,
        busiest_minute_requests=busiest,
        busiest_minute_begin_s=busiest_begin_ns / 1e9,
        num_sessions=len(sessions),
        tenants=dict(sorted(tenants.items())),
        prompt=prompt,
        output=_lengths(outputs),
        shareable_prompt_share=num_shareable / prompt.total if prompt.total else 0.0,
        counts=workload.counts,
    )


def _served_at_once(workload: Workload) -> Iterator[TraceRequest]:
    arrivals = workload.arrivals()
    upcoming = next(arrivals, None)
    following: list[tuple[int, int, TraceRequest]] = []
    sequence = 0
    while upcoming is not None or following:
        if upcoming is not None and (not following or upcoming.arrival_ns <= following[0][0]):
            request, upcoming = upcoming, next(arrivals, None)
        else:
            request = heapq.heappop(following)[2]
        yield request
        for follower in workload.followers(request, request.arrival_ns):
            sequence += 1
            heapq.heappush(following, (follower.arrival_ns, sequence, follower))


class _Prefixes:
    """All prompts seen, as a tree of runs."""

    def __init__(self) -> None:
        self._longest: dict[tuple[int, int], int] = {}  # (node, content id) -> tokens of it seen there
        self._nodes: dict[tuple[int, int, int], int] = {}  # (node, content id, tokens) -> node after that run

    def add(self, segments: Sequence[tuple[int, int]]) -> int:
        """Tokens that this prompt's beginning has in common with an earlier one's."""
        node, num_common, is_common = 0, 0, True
        for content_id, num_tokens in segments:
            seen = self._longest.get((node, content_id), 0)
            if is_common:
                num_common += min(seen, num_tokens)
                is_common = seen >= num_tokens
            if num_tokens > seen:
                self._longest[node, content_id] = num_tokens
            node = self._nodes.setdefault((node, content_id, num_tokens), len(self._nodes) + 1)
        return num_common


def _lengths(values: list[int]) -> LengthSummary:
    if not values:
        return LengthSummary(0, 0.0, 0, 0, 0, 0, 0)
    ordered = sorted(values)
    total = sum(ordered)
    return LengthSummary(
        total=total,
        mean=total / len(ordered),
        min=ordered[0],
        p50=int(percentile(ordered, 0.5)),
        p90=int(percentile(ordered, 0.9)),
        p99=int(percentile(ordered, 0.99)),
        max=ordered[-1],
    )
