"""Both cores together under random workloads and faults."""

from __future__ import annotations

import random

import msgspec
import pytest
from core_ring import CoreRing, submit
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from octavo.actors.scheduler.config import SchedulerConfig


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 17, 64, 100, 256]))
    num_blocks = draw(st.integers(2 if block_size == 1 else 1, 24) | st.integers(8, 60))
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=draw(st.integers(2, 120)),
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.integers(1, 40) | st.just(500)),
        pipeline_depth=draw(st.integers(1, 3)),
        max_num_queued_requests=draw(st.sampled_from([3, 1000])),
        max_num_queued_tokens=draw(st.sampled_from([60, 100_000])),
        priority_aging_ns=draw(st.sampled_from([0, 1000, 1_000_000])),
        long_prefill_threshold=draw(st.sampled_from([0, 0, 3])),
        enable_prefix_caching=draw(st.booleans()),
    )


@st.composite
def scripts(draw: st.DrawFn) -> tuple[SchedulerConfig, int, int, int, float, float]:
    return (
        draw(configs()),
        draw(st.integers(0, 2**32)),  # seed of workload and interleaving
        draw(st.integers(1, 30)),  # requests
        draw(st.sampled_from([2, 3, 8, 50])),  # vocabulary
        draw(st.sampled_from([0.0, 0.02, 0.1])),  # chance of a fault per delivery
        draw(st.sampled_from([0.0, 0.0, 0.01])),  # chance of a loss of the executor per delivery
    )


def random_request(rng: random.Random, ring: CoreRing, request_id: int, prefixes: list[list[int]]):
    config = ring.config
    prompt = list(rng.choice(prefixes))
    prompt += [rng.randrange(ring.vocab) for _ in range(rng.choice([0, 1, 2, 5, 20]))]
    prompt = prompt[: rng.randrange(1, config.max_sequence_len + 3)] or [1]
    return submit(
        request_id,
        prompt,
        max_tokens=rng.choice([1, 2, 5, 30, None]),
        seed=rng.randrange(3),
        min_tokens=rng.choice([0, 0, 4]),
        eos=rng.random() < 0.5,
        prompt_logprobs=rng.choice([None, None, None, 0]),
        priority=rng.choice([0, 0, 0, -1, 2]),
        cache_salt=rng.choice(["", "", "a", "b"]),
        arrival_ns=ring.now_ns,
        deadline_ns=ring.now_ns + rng.randrange(1, 200_000) if rng.random() < 0.1 else 0,
    )


# The news of a failed row is lost with the executor, and the request goes on: the row computed after it counts not.
LOSS_AFTER_A_FAILED_ROW = SchedulerConfig(
    num_blocks=9,
    block_size=7,
    max_model_len=62,
    max_num_seqs=1,
    max_num_batched_tokens=1,
    max_num_queued_requests=3,
    max_num_queued_tokens=60,
    priority_aging_ns=0,
    enable_prefix_caching=False,
)


def run_script(
    config: SchedulerConfig,
    seed: int,
    num_requests: int,
    vocab: int,
    fault_rate: float,
    loss_rate: float,
) -> CoreRing:
    ring = CoreRing(config, seed=seed, vocab=vocab)
    rng = ring.rng
    prefixes = [[rng.randrange(vocab) for _ in range(rng.choice([1, 8, 33, 60]))] for _ in range(3)]
    next_id = 0
    num_faults = 0
    while next_id < num_requests or (num_faults < 60 and ring.busy_edges):
        if next_id < num_requests and rng.random() < 0.1:
            request = random_request(rng, ring, next_id, prefixes)
            leader = next_id
            for sibling in range(rng.choice([1, 1, 1, 3])):
                fields = {} if sibling == 0 else {"fork_of": leader, "request_id": leader + sibling}
                ring.submit(msgspec.structs.replace(request, **fields))
                next_id += 1
        if ring.requests and rng.random() < fault_rate:
            num_faults += 1
            victim = rng.choice(list(ring.requests))
            rng.choice([ring.cancel, ring.stop, ring.fail_row, lambda _: ring.reset_prefix_cache()])(victim)
        if rng.random() < loss_rate:
            num_faults += 1
            ring.lose_executor()
        ring.step_randomly()
    ring.executor.fail_next.clear()
    ring.run()
    return ring


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(scripts())
def test_no_workload_or_fault_loses_a_block_a_token_or_a_request(script) -> None:
    run_script(*script)


@pytest.mark.parametrize("seed", range(8))
def test_histories_that_differ_in_a_few_tokens_never_share_a_wrong_block(seed: int) -> None:
    config = SchedulerConfig(num_blocks=40, block_size=2, max_model_len=60, max_num_seqs=6, max_num_batched_tokens=30)
    ring = run_script(config, seed, 30, 2, 0.02, 0.0)
    assert ring.scheduler.stats().num_ended > 10
    assert ring.scheduler.stats().prefix_cache_hits > 20


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs(), st.integers(0, 2**32))
@example(LOSS_AFTER_A_FAILED_ROW, 54214)
def test_the_same_script_gives_the_same_plans(config: SchedulerConfig, seed: int) -> None:
    first, second = (run_script(config, seed, 12, 3, 0.05, 0.005) for _ in range(2))
    assert first.plans == second.plans
    assert list(first.ended.items()) == list(second.ended.items())
