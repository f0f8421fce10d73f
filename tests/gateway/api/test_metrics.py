from __future__ import annotations

import asyncio

import msgspec
from fake_engine import FakeEngine
from http_client import serving
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.api.engine_metrics import DROP_REASONS, RESTARTING_ACTORS
from octavo.gateway.api.metrics import ITL_BUCKETS, TokenHistogram
from octavo.gateway.stats import EngineStats

gaps = st.sampled_from([0.0, *ITL_BUCKETS, 0.0101, 3.0, 1e6])


@given(st.lists(gaps))
def test_each_gap_is_counted_in_its_bucket_also_when_it_comes_again(values: list[float]) -> None:
    histogram = TokenHistogram((("gap", "Time."),), ITL_BUCKETS, ("model", "0"))
    for value in values:
        histogram.observe(value)
    (family,) = histogram.collect()
    counts = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "gap_bucket"}
    assert counts == {
        **{str(bound): sum(value <= bound for value in values) for bound in ITL_BUCKETS},
        "+Inf": len(values),
    }


class CountingEngine(FakeEngine):
    """Says of faults whatever it is told to."""

    def __init__(self, **counts: object) -> None:
        super().__init__()
        self.counts = counts

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(super().stats(), **self.counts)


def lines_of(engine: FakeEngine, name: str) -> dict[str, float]:
    """Value by the one label that is not the same for all."""

    async def run() -> str:
        async with serving(engine) as client:
            return (await client.get("/metrics")).body.decode()

    found = {}
    for line in asyncio.run(run()).splitlines():
        if line.startswith(name + "{"):
            labels, _, value = line.rpartition(" ")
            own = [
                label
                for label in labels[len(name) + 1 : -1].split(",")
                if not label.startswith(("engine=", "model_name="))
            ]
            found[",".join(own)] = float(value)
    return found


def test_restarts_requeues_drops_and_quarantines_are_told_each_by_its_kind() -> None:
    engine = CountingEngine(
        actor_restarts={"executor": 5, "engine": 1, "tokenizer": 3},
        num_requeued=128,
        num_quarantined=1,
        num_failed_streams=6,
        num_late_compilations=3,
        num_dropped_messages=4,
        messages_dropped={"stale_incarnation": 7, "repeated": 2, "resent": 50},
    )
    assert lines_of(engine, "octavo:actor_restarts_total") == {
        'actor="executor"': 5.0,
        'actor="engine"': 1.0,
        'actor="tokenizer"': 3.0,
    }
    assert lines_of(engine, "octavo:requests_requeued_total") == {"": 128.0}
    assert lines_of(engine, "octavo:requests_quarantined_total") == {"": 1.0}
    assert lines_of(engine, "octavo:streams_failed_total") == {"": 6.0}
    assert lines_of(engine, "octavo:late_compilations_total") == {"": 3.0}
    assert lines_of(engine, "octavo:messages_dropped_total") == {
        'reason="late"': 4.0,
        'reason="stale_incarnation"': 7.0,
        'reason="repeated"': 2.0,
    }


def test_what_engines_accepted_is_told_with_what_became_of_it() -> None:
    engine = CountingEngine(num_accepted=20, num_completed=9, num_failed=1, num_cancelled=2, num_lost=3, num_running=5)
    told = lines_of(engine, "octavo:engine_requests_total")
    assert told == {
        'event="accepted"': 20.0,
        'event="finished"': 9.0,
        'event="failed"': 1.0,
        'event="cancelled"': 2.0,
        'event="lost"': 3.0,
    }
    (num_running,) = lines_of(engine, "vllm:num_requests_running").values()
    assert told.pop('event="accepted"') == sum(told.values()) + num_running


def test_no_fact_is_told_under_two_names_but_for_vllm_s_older_ones() -> None:
    async def run() -> str:
        async with serving(CountingEngine(num_dropped_messages=4711, actor_restarts={"executor": 4712})) as client:
            return (await client.get("/metrics")).body.decode()

    text = asyncio.run(run())
    assert [text.count(f" {value}.0\n") for value in (4711, 4712)] == [1, 1]


def test_an_engine_that_never_failed_says_so_in_zeros() -> None:
    assert lines_of(FakeEngine(), "octavo:actor_restarts_total") == {'actor="executor"': 0.0, 'actor="engine"': 0.0}
    assert lines_of(FakeEngine(), "octavo:messages_dropped_total") == {'reason="late"': 0.0}


def test_names_that_nobody_foresaw_share_one_label() -> None:
    engine = CountingEngine(
        actor_restarts={f"actor {index}": 1 for index in range(1000)},
        messages_dropped={f"reason {index}": 2 for index in range(1000)},
    )
    restarts = lines_of(engine, "octavo:actor_restarts_total")
    assert restarts['actor="other"'] == 1000.0 and len(restarts) <= len(RESTARTING_ACTORS) + 1
    drops = lines_of(engine, "octavo:messages_dropped_total")
    assert drops['reason="other"'] == 2000.0 and len(drops) <= len(DROP_REASONS) + 1


def test_prompt_tokens_are_told_by_where_they_came_from_and_add_up() -> None:
    engine = CountingEngine(prompt_tokens=70, prefix_cache_queries=100, prefix_cache_hits=30)
    sources = lines_of(engine, "vllm:prompt_tokens_by_source_total")
    assert sources == {'source="local_compute"': 70.0, 'source="local_cache_hit"': 30.0}
    assert lines_of(engine, "vllm:prompt_tokens_total") == {"": 100.0}
    assert lines_of(engine, "vllm:prompt_tokens_cached_total") == {"": 30.0}


def test_who_waits_is_told_with_the_reason() -> None:
    assert lines_of(CountingEngine(num_waiting=3), "vllm:num_requests_waiting_by_reason") == {'reason="capacity"': 3.0}


VLLM = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
    "cache_config_info",
    "prefix_cache_hit_rate",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "gpu_prefix_cache_queries_total",
    "gpu_prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prompt_tokens_by_source_total",
    "prompt_tokens_cached_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_bucket",
    "request_params_max_tokens_bucket",
    "request_params_n_bucket",
    "request_prefill_kv_computed_tokens_bucket",
    "request_num_preemptions_bucket",
]


def test_every_name_of_vllm_s_that_means_something_here_is_there_from_the_start() -> None:
    async def run() -> str:
        async with serving(FakeEngine()) as client:
            return (await client.get("/metrics")).body.decode()

    text = asyncio.run(run())
    assert [name for name in VLLM if f"\nvllm:{name}{{" not in text] == []


def test_steps_are_told_by_their_tokens_as_a_histogram() -> None:
    counts = [0] * 16
    counts[0], counts[5], counts[15] = 3, 2, 1  # of 1 token, of 17 to 32, and of more than 16384
    engine = CountingEngine(step_sizes=tuple(counts), step_tokens=20_063)
    buckets = lines_of(engine, "vllm:iteration_tokens_total_bucket")
    assert len(buckets) == 16
    assert [buckets[f'le="{bound}"'] for bound in ("1.0", "16.0", "32.0", "16384.0", "+Inf")] == [3, 3, 5, 5, 6]
    assert lines_of(engine, "vllm:iteration_tokens_total_count") == {"": 6.0}
    assert lines_of(engine, "vllm:iteration_tokens_total_sum") == {"": 20_063.0}
    assert lines_of(FakeEngine(), "vllm:iteration_tokens_total_count") == {"": 0.0}


def test_an_engine_that_answers_is_healthy() -> None:
    engine = FakeEngine()
    assert lines_of(engine, "vllm:engine_healthy") == {"": 1.0}
    engine.is_ready = False
    assert lines_of(engine, "vllm:engine_healthy") == {"": 0.0}


def test_requests_whose_numbers_are_none_are_counted_apart() -> None:
    async def run(code: str) -> str:
        engine = FakeEngine()
        engine.refuse_with = (code, "no numbers")
        async with serving(engine) as client:
            await client.complete()
            return (await client.get("/metrics")).body.decode()

    for code, expected in (("model_numerics", 1.0), ("request_failed", 0.0)):
        (line,) = [
            line for line in asyncio.run(run(code)).splitlines() if line.startswith("vllm:corrupted_requests_total{")
        ]
        assert float(line.rpartition(" ")[2]) == expected
