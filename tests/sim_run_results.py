"""Results of simulations that never ran, for tests of what is made of them."""

from __future__ import annotations

import random

from octavo.sim.results import Distribution, ReplicaResult, RequestRecord, RunResult, TimelinePoint


def make_records(count: int = 400, seed: int = 0) -> list[RequestRecord]:
    """Requests of a plausible hour; every 50th is refused."""
    chance = random.Random(f"{seed}:records")
    records = []
    arrival_ns = 0
    for index in range(count):
        arrival_ns += int(chance.expovariate(5.5) * 1e9)
        num_prompt, num_output = int(chance.lognormvariate(6.5, 1)) + 1, int(chance.lognormvariate(5, 0.8)) + 1
        if index % 50 == 49:
            records.append(
                RequestRecord(index, -1, "", "refused", num_prompt, 0, 0, 0, arrival_ns, -1, -1, -1, arrival_ns)
            )
            continue
        scheduled_ns = arrival_ns + int(chance.expovariate(30) * 1e9)
        first_ns = scheduled_ns + num_prompt * 50_000
        last_ns = first_ns + int((num_output - 1) * chance.uniform(8e6, 2e7))
        records.append(
            RequestRecord(
                index, index % 4, "", "done", num_prompt, num_output, 0, 0,
                arrival_ns, scheduled_ns, first_ns, last_ns, last_ns,
            )
        )  # fmt: skip
    return records


def distribution(values: list[float]) -> Distribution:
    """Nearest rank."""
    ordered = sorted(value for value in values if value == value) or [0.0]

    def at(percent: int) -> float:
        return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]

    return Distribution(sum(ordered) / len(ordered), at(50), at(90), at(95), at(99), ordered[-1])


def make_result(
    records: list[RequestRecord] | None = None, *, num_replicas: int = 4, seed: int = 0, **changes: object
) -> RunResult:
    """A result that agrees with `records` where they meet."""
    records = make_records(seed=seed) if records is None else records
    chance = random.Random(f"{seed}:result")
    done = [record for record in records if record.outcome == "done"]
    duration_s = max((record.ended_ns for record in records), default=1) / 1e9
    timeline = []
    waiting, running = 0.0, 20.0
    for i in range(1200):
        waiting = max(0.0, waiting * 0.97 + chance.gauss(0, 1.6))
        running = max(1.0, running + chance.gauss(0, 3) + (40 - running) * 0.03)
        timeline.append(TimelinePoint(duration_s * i / 1199, int(waiting), int(running), min(1.0, running / 70)))
    fields: dict[str, object] = {
        "workload": "azure_conv.csv",
        "config": {"gpu": "H100", "model": "Llama-3.1-8B", "max_num_seqs": 256, "enable_prefix_caching": True},
        "step_time": {"kind": "closed form", "bandwidth_efficiency": 0.69},
        "counts": {"num_rows": len(records), "num_requests": len(records)},
        "num_requests": len(records),
        "num_done": len(done),
        "num_cancelled": 0,
        "num_timeout": 0,
        "num_refused": len(records) - len(done),
        "refused_because": {"queue_full": len(records) - len(done)} if len(records) > len(done) else {},
        "num_failed": 0,
        "duration_s": duration_s,
        "load": "STABLE",
        "request_rate": len(records) / duration_s,
        "prompt_token_rate": sum(record.num_prompt_tokens for record in done) / duration_s,
        "output_token_rate": sum(record.num_output_tokens for record in done) / duration_s,
        "goodput_rps": len(done) / duration_s,
        "slo_attainment": 0.985,
        "slo": {"ttft_p99": 1.0, "tpot_p99": 0.05},
        "slo_met": True,
        "ttft_s": distribution([record.ttft_s for record in done]),
        "tpot_s": distribution([record.tpot_s for record in done]),
        "itl_s": distribution([record.tpot_s for record in done]),
        "e2e_s": distribution([record.e2e_s for record in done]),
        "queue_s": distribution([(record.scheduled_ns - record.arrival_ns) / 1e9 for record in done]),
        "prefix_hit_rate": 0.0,
        "num_preemptions": 3,
        "num_recomputed_tokens": 4100,
        "kv_use_mean": 0.41,
        "kv_use_peak": 0.87,
        "busy_share": 0.62,
        "cost_per_hour": 11.96,
        "cost_per_million_output_tokens": 2.9,
        "extrapolated_share": 0.0,
        "num_steps": 51_200,
        "num_steps_skipped": 44_000,
        "replicas": tuple(
            ReplicaResult(
                num_requests=len(records) // num_replicas,
                num_steps=12_800,
                num_steps_skipped=11_000,
                busy_share=chance.uniform(0.5, 0.75),
                mean_batch=chance.uniform(8, 16),
                kv_use_peak=chance.uniform(0.7, 1.0),
                num_preemptions=chance.choice([0, 0, 3]),
                num_recomputed_tokens=0,
            )
            for _ in range(num_replicas)
        ),
        "timeline": tuple(timeline),
        "event_log_sha256": "0" * 64,
    }
    return RunResult(**{**fields, **changes})  # type: ignore[arg-type]  # loosely typed on purpose
