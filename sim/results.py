"""What a simulation found."""

from __future__ import annotations

from typing import Literal

import msgspec

SCHEMA_VERSION = 1

Outcome = Literal["done", "cancelled", "timeout", "refused", "failed"]
Load = Literal["STABLE", "BACKLOGGED", "REFUSING", "OVERLOADED"]


class RequestRecord(msgspec.Struct, gc=False):
    """What became of one request; times in ns of virtual time, -1 where it did not happen.

    Attributes:
        index: in the order of arrival.
        replica: which one served it; -1: none.
        num_prompt_tokens, num_output_tokens: as computed; outputs until its end.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        arrival_ns: at the gateway.
        scheduled_ns: its first step was planned.
        first_token_ns, last_token_ns: sent to the client.
        ended_ns: its end, whatever it was.
    """

    index: int
    replica: int
    tenant: str
    outcome: Outcome
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    arrival_ns: int
    scheduled_ns: int
    first_token_ns: int
    last_token_ns: int
    ended_ns: int

    @property
    def ttft_s(self) -> float:
        """Time to first token, from arrival at the gateway."""
        return (self.first_token_ns - self.arrival_ns) / 1e9

    @property
    def e2e_s(self) -> float:
        """End to end: arrival to last token."""
        return (self.last_token_ns - self.arrival_ns) / 1e9

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; undefined (NaN) for one-token outputs."""
        if self.num_output_tokens < 2:
            return float("nan")
        return (self.last_token_ns - self.first_token_ns) / 1e9 / (self.num_output_tokens - 1)


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles (nearest rank: the smallest value that at least p % do not exceed), in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class ReplicaResult(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's account.

    Attributes:
        busy_share: part of the run that its device was computing.
        mean_batch: rows of a step, weighted by its duration.
        kv_use_peak: held blocks of all blocks, 0 to 1; the highest at the instants of the timeline.
        num_steps: executed; of them `num_steps_skipped` were advanced over by fast-forward.
    """

    num_requests: int
    num_steps: int
    num_steps_skipped: int
    busy_share: float
    mean_batch: float
    kv_use_peak: float
    num_preemptions: int
    num_recomputed_tokens: int


class TimelinePoint(msgspec.Struct, frozen=True, gc=False):
    """The cluster at an instant: sums over replicas.

    Attributes:
        time_s: virtual.
        num_waiting, num_running: requests.
        kv_use: held blocks of all blocks, 0 to 1.
    """

    time_s: float
    num_waiting: int
    num_running: int
    kv_use: float


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration on one workload. Field names are the JSON's.

    Attributes:
        refused_because: number of requests refused, by the code of the engine's error.
        load: STABLE; BACKLOGGED: the queue grew over the run; REFUSING: it stayed short because requests were turned
            away; OVERLOADED: it never drained while requests came. Percentiles of anything but STABLE describe the
            length of the run, or the few that were served, not the configuration.
        ttft_s, tpot_s, itl_s, e2e_s, queue_s: over requests that are done (TPOT: with two or more tokens).
        goodput_rps: requests a second that are done and meet every limit of the SLO (all done ones, without an SLO).
        slo_attainment: those as a share of all requests.
        extrapolated_share: steps outside the step-time model's coverage.
        event_log_sha256: of every decision and time; equal if and only if two runs went alike.
    """

    schema_version: int = SCHEMA_VERSION
    workload: str
    config: dict[str, str | int | float | bool]
    step_time: dict[str, str | int | float]
    counts: dict[str, int]
    num_requests: int
    num_done: int
    num_cancelled: int
    num_timeout: int
    num_refused: int
    refused_because: dict[str, int]
    num_failed: int
    duration_s: float
    load: Load
    request_rate: float
    prompt_token_rate: float
    output_token_rate: float
    goodput_rps: float
    slo_attainment: float
    slo: dict[str, float]
    slo_met: bool
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2e_s: Distribution
    queue_s: Distribution
    prefix_hit_rate: float
    num_preemptions: int
    num_recomputed_tokens: int
    kv_use_mean: float
    kv_use_peak: float
    busy_share: float
    cost_per_hour: float
    cost_per_million_output_tokens: float
    extrapolated_share: float
    num_steps: int
    num_steps_skipped: int
    replicas: tuple[ReplicaResult, ...]
    timeline: tuple[TimelinePoint, ...]
    event_log_sha256: str
