"""From records to figures; the definitions are the load generator's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..actors.runtime.percentile import percentile
from ..messages.errors import QueueFullError
from .config import SimConfig
from .gaps import GapHistogram
from .results import Distribution, Load, ReplicaResult, RequestRecord, RunResult, TimelinePoint
from .slo import Slo, SloTerm
from .step_time.interface import StepTimeModel
from .workload.request import Workload

if TYPE_CHECKING:
    from .cluster import Cluster
    from .replica import Replica

NOTHING = Distribution(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)


def distribution(values: Sequence[float]) -> Distribution:
    """Mean and percentiles; all NaN of nothing."""
    if not values:
        return NOTHING
    ordered = sorted(values)
    return Distribution(
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p95=percentile(ordered, 0.95),
        p99=percentile(ordered, 0.99),
        max=ordered[-1],
    )


def summarize(
    config: SimConfig, workload: Workload, model: StepTimeModel, cluster: Cluster, slo: Slo | None
) -> RunResult:
    """All figures of a finished run."""
    records = cluster.records
    done = [record for record in records if record.outcome == "done"]
    with_two = [record for record in done if record.num_output_tokens > 1]
    duration_s = max((max(record.ended_ns, record.last_token_ns) for record in records), default=0) / 1e9
    gaps = GapHistogram()
    for replica in cluster.replicas:
        gaps.merge(replica.tokens.gaps)
    waited_for = [record for record in records if record.outcome != "cancelled"]
    good = done if slo is None else [record for record in done if _is_good(record, slo)]
    terms = () if slo is None else slo.terms
    num_output_tokens = sum(record.num_output_tokens for record in records)
    num_prompt_tokens = sum(record.num_prompt_tokens for record in done)
    cost_per_hour = config.cost_per_replica_hour * config.num_replicas
    num_steps = sum(replica.totals.num_steps for replica in cluster.replicas)
    replicas = tuple(
        _summarize_replica(replica, duration_s, peak, config.scheduler.num_blocks)
        for replica, peak in zip(cluster.replicas, cluster.timeline.peak_use, strict=True)
    )
    points = [point for point in cluster.timeline.points if point.time_s <= duration_s]
    return RunResult(
        workload=workload.name,
        config=describe_config(config),
        step_time=model.describe(),
        counts=_counts(workload),
        num_requests=len(records),
        num_done=len(done),
        num_cancelled=_num(records, "cancelled"),
        num_timeout=_num(records, "timeout"),
        num_refused=_num(records, "refused"),
        refused_because=dict(sorted(cluster.refused_because.items())),
        num_failed=_num(records, "failed"),
        duration_s=duration_s,
        load=label_load(points, records, config, num_turned_away=cluster.refused_because.get(QueueFullError.code, 0)),
        request_rate=_rate(len(done), duration_s),
        prompt_token_rate=_rate(num_prompt_tokens, duration_s),
        output_token_rate=_rate(num_output_tokens, duration_s),
        goodput_rps=_rate(len(good), duration_s),
        slo_attainment=len(good) / len(waited_for) if waited_for else math.nan,
        slo={} if slo is None else slo.limits(),
        slo_met=all(_is_met(term, waited_for, gaps) for term in terms) and not cluster.is_lost,
        ttft_s=distribution([record.ttft_s for record in done]),
        tpot_s=distribution([record.tpot_s for record in with_two]),
        itl_s=_gap_distribution(gaps),
        e2e_s=distribution([record.e2e_s for record in done]),
        queue_s=distribution([(record.scheduled_ns - record.arrival_ns) / 1e9 for record in done]),
        prefix_hit_rate=sum(record.num_cached_tokens for record in done) / max(1, num_prompt_tokens),
        num_preemptions=sum(record.num_preemptions for record in records),
        num_recomputed_tokens=sum(replica.totals.num_recomputed for replica in cluster.replicas),
        kv_use_mean=math.fsum(point.kv_use for point in points) / len(points) if points else 0.0,
        kv_use_peak=max((replica.kv_use_peak for replica in replicas), default=0.0),
        busy_share=math.fsum(replica.busy_share for replica in replicas) / len(replicas),
        cost_per_hour=cost_per_hour,
        cost_per_million_output_tokens=cost_per_hour * duration_s / 3600 / num_output_tokens * 1e6
        if num_output_tokens
        else math.nan,
        extrapolated_share=sum(replica.totals.num_extrapolated for replica in cluster.replicas) / max(1, num_steps),
        num_steps=num_steps,
        num_steps_skipped=sum(replica.totals.num_skipped for replica in cluster.replicas),
        replicas=replicas,
        timeline=tuple(points),
        event_log_sha256=cluster.digest(),
    )


def describe_config(config: SimConfig) -> dict[str, str | int | float | bool]:
    """The configuration as plain values, for JSON."""
    scheduler = config.scheduler
    return {
        "num_replicas": config.num_replicas,
        "routing": config.routing,
        "num_blocks": scheduler.num_blocks,
        "block_size": scheduler.block_size,
        "max_model_len": scheduler.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "long_prefill_threshold": scheduler.long_prefill_threshold,
        "pipeline_depth": scheduler.pipeline_depth,
        "enable_prefix_caching": scheduler.enable_prefix_caching,
        "max_num_queued_requests": scheduler.max_num_queued_requests,
        "ingress_s": config.ingress_ns / 1e9,
        "egress_s": config.egress_ns / 1e9,
        "num_outages": len(config.outages),
    }


def label_load(
    points: Sequence[TimelinePoint], records: Sequence[RequestRecord], config: SimConfig, *, num_turned_away: int
) -> Load:
    """Whether the cluster kept up with what arrived.

    Looks at the waiting requests while requests arrive: OVERLOADED if in the last quarter more wait than twice as many
    as in the second, and the queue was never empty in the last half; BACKLOGGED if in the last quarter more than twice
    as many wait and more than a tenth of the seats. A bounded queue hides that: unless it is OVERLOADED, a run is
    REFUSING if more than 1 % of the requests did not get into the queue, or left it at their deadline. Else STABLE.

    Args:
        num_turned_away: requests refused because too many waited.
    """
    label = _label_queue(points, records, config)
    num_in_vain = sum(record.outcome == "timeout" and record.scheduled_ns < 0 for record in records)
    if label != "OVERLOADED" and num_turned_away + num_in_vain > 0.01 * len(records):
        return "REFUSING"
    return label


def _label_queue(points: Sequence[TimelinePoint], records: Sequence[RequestRecord], config: SimConfig) -> Load:
    """See `label_load`: what the number of those who wait tells."""
    if not records:
        return "STABLE"
    end_s = records[-1].arrival_ns / 1e9
    while_arriving = [point.num_waiting for point in points if point.time_s <= end_s]
    if len(while_arriving) < 8:
        return "STABLE"
    quarter = len(while_arriving) // 4
    early = sum(while_arriving[quarter : 2 * quarter]) / quarter
    late = sum(while_arriving[-quarter:]) / quarter
    seats = config.scheduler.max_num_seqs * config.num_replicas
    if late <= 2 * early or late <= max(1.0, 0.02 * seats):
        always = min(while_arriving[len(while_arriving) // 4 :]) > 0.1 * seats
        return "OVERLOADED" if always else "STABLE"
    if min(while_arriving[len(while_arriving) // 2 :]) > 0:
        return "OVERLOADED"
    return "BACKLOGGED" if late > 0.1 * seats else "STABLE"


def _summarize_replica(replica: Replica, duration_s: float, peak: int, num_blocks: int) -> ReplicaResult:
    totals = replica.totals
    stats = replica.scheduler.stats()
    return ReplicaResult(
        num_requests=totals.num_requests,
        num_steps=totals.num_steps,
        num_steps_skipped=totals.num_skipped,
        busy_share=totals.busy_ns / 1e9 / duration_s if duration_s else 0.0,
        mean_batch=totals.row_ns / totals.busy_ns if totals.busy_ns else 0.0,
        kv_use_peak=peak / num_blocks,
        num_preemptions=stats.num_preemptions,
        num_recomputed_tokens=totals.num_recomputed,
    )


def _is_good(record: RequestRecord, slo: Slo) -> bool:
    """Whether a request that is done meets every limit; its gaps between tokens count by their mean."""
    for metric, limit_s in slo.request_limits().items():
        value = _figure(record, metric)
        if value > limit_s:  # NaN, for one token, is within
            return False
    return True


def _figure(record: RequestRecord, metric: str) -> float:
    match metric:
        case "ttft":
            return record.ttft_s
        case "e2e":
            return record.e2e_s
        case "queue":
            return (record.scheduled_ns - record.arrival_ns) / 1e9
        case _:
            return record.tpot_s


def _is_met(term: SloTerm, records: Sequence[RequestRecord], gaps: GapHistogram) -> bool:
    """Whether one limit holds; a request that was refused, timed out or failed has waited for ever."""
    if term.metric == "itl":
        value = gaps.mean_ns() if term.percentile < 0 else gaps.percentile_ns(term.percentile)
        return not value / 1e9 > term.limit_s
    values = [_figure(record, term.metric) if record.outcome == "done" else math.inf for record in records]
    values = sorted(value for value in values if not math.isnan(value))
    if not values:
        return True
    value = math.fsum(values) / len(values) if term.percentile < 0 else percentile(values, term.percentile / 100)
    return value <= term.limit_s


def _gap_distribution(gaps: GapHistogram) -> Distribution:
    return Distribution(
        mean=gaps.mean_ns() / 1e9,
        p50=gaps.percentile_ns(50) / 1e9,
        p90=gaps.percentile_ns(90) / 1e9,
        p95=gaps.percentile_ns(95) / 1e9,
        p99=gaps.percentile_ns(99) / 1e9,
        max=gaps.max_ns / 1e9 if gaps.count else math.nan,
    )


def _counts(workload: Workload) -> dict[str, int]:
    counts = workload.counts
    return {
        "rows": counts.num_rows,
        "requests": counts.num_requests,
        **{f"skipped: {reason}": number for reason, number in counts.num_skipped.items()},
        **{f"changed: {reason}": number for reason, number in counts.num_changed.items()},
    }


def _num(records: Sequence[RequestRecord], outcome: str) -> int:
    return sum(record.outcome == outcome for record in records)


def _rate(number: float, duration_s: float) -> float:
    return number / duration_s if duration_s else 0.0
