import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from sim_tools import LinearModel, ListWorkload, hostile_config, hostile_workload, small_config

from octavo.actors.scheduler.core import SchedulerCore
from octavo.sim.config import Outage, SimConfig
from octavo.sim.guard import RealWorldError
from octavo.sim.metrics import label_load
from octavo.sim.simulation import simulate
from octavo.sim.slo import parse_slo
from octavo.sim.workload.request import TraceRequest

POLICIES = ["round_robin", "least_loaded", "prefix_aware"]


def run(seed, *, model=None, **fields):
    return simulate(hostile_config(seed, **fields), hostile_workload(seed), model or LinearModel())


def comparable(simulation) -> dict:
    """Everything but how the run was advanced."""
    result = msgspec.to_builtins(simulation.result)
    del result["num_steps_skipped"]
    for replica in result["replicas"]:
        del replica["num_steps_skipped"]
    return json.loads(json.dumps([result, msgspec.to_builtins(simulation.records)]).replace("NaN", "null"))


@pytest.mark.parametrize("host", [0, 3_000_000])
def test_fast_forward_changes_nothing_but_the_number_of_steps_taken(host) -> None:
    num_skipped = num_preempted = 0
    for seed in range(30):
        model = LinearModel(host=host, kv=[0, 10, 700][seed % 3])
        stepped = run(seed, model=model, fast_forward=False)
        skipped = run(seed, model=model)
        assert comparable(stepped) == comparable(skipped), f"{seed=}"
        assert stepped.result.num_steps_skipped == 0
        num_skipped += skipped.result.num_steps_skipped
        num_preempted += skipped.result.num_preemptions
    assert num_skipped > 500
    assert num_preempted > 10


def test_every_request_ends_once_and_its_tokens_are_accounted_for() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(40):
        simulation = run(seed)
        workload = hostile_workload(seed)
        assert len(simulation.records) == len(workload.requests)
        for record, request in zip(simulation.records, workload.requests, strict=True):
            outcomes[record.outcome] += 1
            assert record.ended_ns >= record.arrival_ns == request.arrival_ns
            assert record.num_output_tokens <= request.num_output_tokens
            if record.outcome == "done":
                most = hostile_config(seed).scheduler.max_sequence_len - request.num_prompt_tokens
                assert record.num_output_tokens == min(request.num_output_tokens, most)
                assert record.arrival_ns <= record.first_token_ns <= record.last_token_ns
            if record.outcome == "cancelled":
                assert request.cancel_after_ns
            if record.outcome == "timeout":
                assert request.timeout_ns
        result = simulation.result
        assert result.num_requests == (
            result.num_done + result.num_cancelled + result.num_timeout + result.num_refused + result.num_failed
        )
        assert result.num_failed == 0
    assert set(outcomes) == {"done", "cancelled", "timeout", "refused"}


def test_cores_are_idle_and_own_all_blocks_when_a_run_is_over() -> None:
    for seed in range(20):
        workload, config = hostile_workload(seed), hostile_config(seed)
        from octavo.sim.cluster import Cluster

        cluster = Cluster(config, workload, LinearModel())
        while not cluster.is_done:
            assert cluster.agenda.run_next()
        for _ in range(50):  # what is still in flight comes back
            cluster.agenda.run_next()
        for replica in cluster.replicas:
            replica.catch_up()
            replica.scheduler.check()
            replica.allocator.check()
            assert replica.num_open == 0
            assert replica.scheduler.num_requests == 0
            assert replica.allocator.stats().num_held == 0


def test_little_s_law_holds_for_the_cluster() -> None:
    """The mean number in the system is the arrival rate times the mean time there, exactly, over a whole run."""
    simulation = run(3, num_replicas=2)
    events = sorted(
        [(record.arrival_ns, 1) for record in simulation.records]
        + [(record.ended_ns, -1) for record in simulation.records]
    )
    area = inside = before = 0
    for time_ns, change in events:
        area += inside * (time_ns - before)
        inside += change
        before = time_ns
    assert inside == 0
    assert area == sum(record.ended_ns - record.arrival_ns for record in simulation.records)


@pytest.mark.parametrize("routing", POLICIES)
def test_twenty_runs_have_one_event_log_with_fast_forward_and_without(routing) -> None:
    runs = [run(5, routing=routing, num_replicas=3, fast_forward=i % 2 == 0) for i in range(20)]
    assert len({simulation.result.event_log_sha256 for simulation in runs}) == 1
    assert comparable(runs[0]) == comparable(runs[1])


def test_another_workload_or_configuration_has_another_event_log() -> None:
    logs = [run(seed, routing="round_robin", num_replicas=2).result.event_log_sha256 for seed in range(8)]
    assert len({*logs}) == len(logs)


_IN_A_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from sim_tools import *
from octavo.sim.simulation import simulate
for routing in ["round_robin", "least_loaded", "prefix_aware"]:
    config = hostile_config(7, routing=routing, num_replicas=3)
    print(simulate(config, hostile_workload(7), LinearModel()).result.event_log_sha256)
"""


def test_the_event_log_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    tests = str(Path(__file__).parent.parent)
    printed = [
        subprocess.run(
            [sys.executable, "-c", _IN_A_PROCESS, tests],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    ]
    assert len(printed[0].split()) == 3
    assert printed[0] == printed[1] == printed[2]


def test_a_broken_scheduler_is_noticed_by_the_simulator(monkeypatch) -> None:
    """There is no second scheduler here: what is done to the engine's shows at once."""
    before = run(5).result.event_log_sha256
    handle = SchedulerCore.handle

    def lose_cancels(self, message, now_ns):
        return [] if type(message).__name__ == "CancelRequest" else handle(self, message, now_ns)

    monkeypatch.setattr(SchedulerCore, "handle", lose_cancels)
    assert run(5).result.event_log_sha256 != before


def test_scaling_all_times_scales_all_latencies() -> None:
    workload = hostile_workload(11)

    def scaled(factor):
        requests = [
            msgspec.structs.replace(
                request,
                arrival_ns=request.arrival_ns * factor,
                cancel_after_ns=request.cancel_after_ns * factor,
                timeout_ns=request.timeout_ns * factor,
            )
            for request in workload.requests
        ]
        model = LinearModel(1_000_000 * factor, 10_000 * factor, 10 * factor, 0)
        config = SimConfig(scheduler=small_config(priority_aging_ns=1_000_000 * factor))
        return simulate(config, ListWorkload(requests), model).records

    for slow, fast in zip(scaled(7), scaled(1), strict=True):
        assert slow.outcome == fast.outcome
        assert slow.ended_ns == 7 * fast.ended_ns
        if fast.first_token_ns >= 0:
            assert slow.first_token_ns == 7 * fast.first_token_ns


def test_twice_the_replicas_and_twice_the_load_leave_each_request_as_it_was() -> None:
    requests = hostile_workload(12).requests
    twice = [request for request in requests for _ in range(2)]
    config = SimConfig(scheduler=small_config(), routing="round_robin")
    one = simulate(config, ListWorkload(requests), LinearModel()).records
    two = simulate(msgspec.structs.replace(config, num_replicas=2), ListWorkload(twice), LinearModel()).records
    times = [(record.first_token_ns, record.ended_ns, record.outcome) for record in one]
    for offset in range(2):
        assert [(record.first_token_ns, record.ended_ns, record.outcome) for record in two[offset::2]] == times


def test_prefix_caching_changes_nothing_for_prompts_that_share_nothing() -> None:
    requests = [TraceRequest(i * 2_000_000, ((i, 5 + i % 37),), 1 + i % 60, 10_000 + i) for i in range(80)]
    for num_blocks in (45, 400):
        runs = [
            simulate(
                SimConfig(scheduler=small_config(num_blocks=num_blocks, enable_prefix_caching=cached)),
                ListWorkload(requests),
                LinearModel(),
            )
            for cached in (False, True)
        ]
        if num_blocks == 400:
            assert [r.ended_ns for r in runs[0].records] == [r.ended_ns for r in runs[1].records]
            assert runs[0].result.num_preemptions == 0
        else:  # a preempted request finds its own blocks again
            assert runs[0].result.num_preemptions > 0
            assert runs[1].result.num_recomputed_tokens <= runs[0].result.num_recomputed_tokens


def test_a_request_that_cannot_be_admitted_changes_nobody_elses_result() -> None:
    requests = list(hostile_workload(13).requests)
    config = SimConfig(scheduler=small_config(num_blocks=64))
    alone = simulate(config, ListWorkload(requests), LinearModel()).records
    never_fits = TraceRequest(requests[10].arrival_ns, ((77, 400),), 5, 99)
    with_it = simulate(config, ListWorkload([*requests[:10], never_fits, *requests[10:]]), LinearModel()).records
    assert with_it[10].outcome == "refused"
    del with_it[10]
    assert [(r.outcome, r.ended_ns) for r in with_it] == [(r.outcome, r.ended_ns) for r in alone]


def test_requests_of_a_lost_replica_go_on_with_their_tokens_when_it_is_back() -> None:
    requests = [TraceRequest(i * 1_000_000, ((i, 20),), 40, 1000 + i) for i in range(10)]
    begin, end = 20_000_000, 500_000_000
    config = SimConfig(
        scheduler=small_config(), num_replicas=2, outages=(Outage(1, begin, end),), routing="round_robin"
    )
    simulation = simulate(config, ListWorkload(requests), LinearModel())
    assert simulation.result.num_done == 10
    late = [record for record in simulation.records if record.replica == 1]
    assert all(record.last_token_ns > end for record in late)
    assert any(0 < record.first_token_ns < begin for record in late)
    assert simulation.result.num_recomputed_tokens > 0
    assert all(record.last_token_ns < end for record in simulation.records if record.replica == 0)


def test_no_request_is_routed_to_a_replica_that_is_down() -> None:
    requests = [TraceRequest(i * 1_000_000, ((i, 20),), 4, 1000 + i) for i in range(30)]
    for routing in POLICIES:
        config = SimConfig(
            scheduler=small_config(), num_replicas=3, outages=(Outage(1, 5_000_000, 18_000_000),), routing=routing
        )
        records = simulate(config, ListWorkload(requests), LinearModel()).records
        down = [r for r in records if 5_000_000 < r.arrival_ns < 18_000_000]
        assert down
        assert all(record.replica != 1 for record in down)


def test_followers_arrive_after_the_request_that_set_them_off() -> None:
    def follow(request, ended_ns):
        if request.session >= 3:
            return ()
        return (
            TraceRequest(
                ended_ns + 5_000_000,
                (*request.segments, (request.answer_id, request.num_output_tokens), (900 + request.session, 3)),
                10,
                2000 + request.session,
                session=request.session + 1,
            ),
        )

    first = TraceRequest(0, ((1, 21),), 9, 1999, session=0)
    config = SimConfig(scheduler=small_config())
    simulation = simulate(config, ListWorkload([first], follow), LinearModel())
    assert len(simulation.records) == 4
    for before, after in zip(simulation.records, simulation.records[1:], strict=False):
        assert after.arrival_ns == before.last_token_ns + 5_000_000
        # A turn finds the one before in the cache: all its full blocks but the token that was never computed.
        known = before.num_prompt_tokens + before.num_output_tokens - 1
        assert after.num_cached_tokens == known // 4 * 4


def test_the_real_world_is_out_of_reach_of_what_is_simulated() -> None:
    import random
    import socket
    import threading
    import time
    from datetime import datetime

    doors = [
        time.monotonic_ns,
        lambda: time.perf_counter(),
        lambda: random.random(),
        lambda: os.urandom(4),
        lambda: threading.Thread(target=int).start(),
        lambda: socket.socket().close(),
        lambda: __import__("datetime").datetime.now(),
        lambda: __import__("uuid").uuid4(),
    ]
    assert datetime.now() is not None
    for door in doors[1:]:

        class Peeking(LinearModel):
            def step_ns(self, shape, door=door):
                door()
                return 1

        with pytest.raises(RealWorldError):
            run(1, model=Peeking())
        door()  # and everything is back


def test_progress_may_look_at_the_clock() -> None:
    import time

    seen = []
    simulate(
        hostile_config(1),
        hostile_workload(1, 300),
        LinearModel(),
        progress=lambda ended, arrived, seconds: seen.append((ended, arrived, seconds, time.monotonic())),
    )
    assert seen
    assert all(ended <= arrived for ended, arrived, _, _ in seen)


def test_a_run_that_cannot_meet_its_service_level_is_cut_short_only_if_it_would_have_failed() -> None:
    num_cut = 0
    for seed in range(30):
        slo = parse_slo(["ttft_p90<30ms", "tpot_p90<3ms", "e2e_p50<200ms,ttft_p99<1s"][seed % 3])
        whole = simulate(hostile_config(seed), hostile_workload(seed), LinearModel(), slo=slo)
        cut = simulate(hostile_config(seed), hostile_workload(seed), LinearModel(), slo=slo, stop_early=True)
        assert cut.result.slo_met == whole.result.slo_met
        num_cut += cut.is_cut_short
    assert 0 < num_cut < 30


def test_figures_of_a_run_by_hand() -> None:
    """One request: a prompt of 20 tokens, then 3 more tokens, on a device of constant speed."""
    config = SimConfig(
        scheduler=small_config(max_num_batched_tokens=16), ingress_ns=1000, egress_ns=500, cost_per_replica_hour=3.6
    )
    model = LinearModel(step=1_000_000, token=0, kv=0)
    simulation = simulate(config, ListWorkload([TraceRequest(7, ((1, 20),), 4, 2)]), model, slo=parse_slo("e2e_p99<1s"))
    record, result = simulation.records[0], simulation.result
    assert record.first_token_ns == 7 + 1000 + 2 * 1_000_000 + 500
    assert record.last_token_ns == record.first_token_ns + 3_000_000
    assert result.ttft_s.p99 == pytest.approx(2.0015e-3)
    assert result.tpot_s.mean == pytest.approx(1e-3)
    assert result.itl_s.max == pytest.approx(1e-3)
    assert result.num_steps == 5
    assert result.slo_met
    assert result.goodput_rps == pytest.approx(1 / result.duration_s)
    assert result.busy_share == pytest.approx(5e-3 / result.duration_s)
    assert result.cost_per_hour == 3.6


def test_an_empty_workload_is_an_empty_result() -> None:
    result = simulate(SimConfig(scheduler=small_config(), cost_per_replica_hour=1.0), ListWorkload([]), LinearModel())
    assert result.result.num_requests == 0
    assert math.isnan(result.result.ttft_s.p50)
    assert math.isnan(result.result.cost_per_million_output_tokens), "there is no output token to pay for"


def crowd(gap_ns: int, num_requests: int = 400) -> ListWorkload:
    """One request after the other, each of 16 + 20 tokens; twenty seats of the model take 24 ms for twenty of them."""
    return ListWorkload([TraceRequest(i * gap_ns, ((i, 16),), 20, 1000 + i) for i in range(num_requests)])


def test_a_bounded_queue_does_not_hide_an_overload() -> None:
    config = SimConfig(scheduler=small_config(max_num_seqs=20, num_blocks=400, max_num_queued_requests=2))
    result = simulate(config, crowd(500_000), LinearModel()).result
    assert result.num_refused > 100
    assert result.refused_because == {"queue_full": result.num_refused}
    assert result.load == "REFUSING"
    in_time = simulate(config, crowd(3_000_000), LinearModel()).result
    assert (in_time.num_refused, in_time.refused_because, in_time.load) == (0, {}, "STABLE")


def test_nor_do_deadlines_that_pass_in_the_queue() -> None:
    config = SimConfig(scheduler=small_config())
    records = simulate(config, crowd(3_000_000, 100), LinearModel()).records
    in_vain = [msgspec.structs.replace(record, outcome="timeout", scheduled_ns=-1) for record in records]
    too_slow = [msgspec.structs.replace(record, outcome="timeout") for record in records]
    assert label_load([], [*in_vain[:2], *records[2:]], config, num_turned_away=0) == "REFUSING"
    assert label_load([], [*in_vain[:1], *records[1:]], config, num_turned_away=1) == "REFUSING"
    assert label_load([], [*in_vain[:1], *records[1:]], config, num_turned_away=0) == "STABLE"
    assert label_load([], too_slow, config, num_turned_away=0) == "STABLE", "no seat would have helped them"


def test_what_no_configuration_would_take_is_no_overload() -> None:
    config = SimConfig(scheduler=small_config(num_blocks=4))
    result = simulate(config, crowd(10_000_000), LinearModel()).result
    assert result.refused_because == {"context_length_exceeded": 400}
    assert result.load == "STABLE"


@pytest.mark.parametrize(
    "fields",
    [
        {"num_replicas": 0},
        {"num_replicas": 100_001},
        {"ingress_ns": -1},
        {"ingress_ns": 3601 * 10**9},
        {"egress_ns": 10**30},
        {"outages": (Outage(0, 5, 5),)},
        {"outages": (Outage(1, 0, 5),)},
        {"outages": (Outage(-1, 0, 5),)},
        {"outages": (Outage(0, -1, 5),)},
        {"outages": (Outage(0, 0, 10**200),)},
    ],
    ids=str,
)
def test_a_cluster_that_cannot_be_is_refused(fields) -> None:
    with pytest.raises(ValueError, match=r"must be|an outage is of"):
        SimConfig(**{"scheduler": small_config(), "num_replicas": 1, **fields})
