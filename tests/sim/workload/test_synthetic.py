"""Workloads made of chance: their statistics, conversations, closed loops, and that seeds decide all."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workload_tools import SECOND, SHAPES, served, shape

from octavo.messages.errors import InvalidWorkloadError
from octavo.sim.workload.arrivals import ArrivalProcess
from octavo.sim.workload.draws import Draw, Stream
from octavo.sim.workload.request import TraceRequest
from octavo.sim.workload.spec import make_workload


def gaps_s(process: ArrivalProcess, num: int, seed: int = 5) -> list[float]:
    return [(b - a) / 1e9 for a, b in pairwise(islice(process.times(seed), num))]


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5


def test_draws_are_a_function_of_seed_name_and_number() -> None:
    stream = Stream(7, "x")
    assert [stream.at(n).uniform() for n in (3, 1, 2)] == [Stream(7, "x").at(n).uniform() for n in (3, 1, 2)]
    values = [Stream(seed, name).at(number).uniform() for seed in (1, 2) for name in "ab" for number in (0, 1, -1)]
    assert len(set(values)) == len(values)


def test_draws_are_those_of_splitmix64() -> None:
    draw = Draw(0)  # the generator's published sequence for seed 0
    for word in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F):
        assert draw.uniform() == (word >> 11) * 2.0**-53


def test_draws_never_change_between_versions() -> None:
    stream = Stream(7, "x")
    found = [stream.at(3).uniform(), stream.at(-1).exponential(), stream.at(4).normal(), stream.at(5).gamma(0.5)]
    assert found == pytest.approx(
        [0.9089906528553596, 0.10677459367857828, 0.041121016800456024, 0.1874945000099168], rel=1e-12
    )


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [("uniform", 0.5, 12**-0.5), ("exponential", 1, 1), ("normal", 0, 1), ("gamma9", 1 / 9, 1 / 3), ("gamma4", 4, 2)],
)
def test_draws_have_their_moments(name: str, mean: float, deviation: float) -> None:
    stream, num = Stream(11, name), 20_000
    draw_of = {
        "uniform": lambda draw: draw.uniform(),
        "exponential": lambda draw: draw.exponential(),
        "normal": lambda draw: draw.normal(),
        "gamma9": lambda draw: draw.gamma(1 / 9),
        "gamma4": lambda draw: draw.gamma(4),
    }[name]
    found_mean, found_deviation = mean_and_deviation([draw_of(stream.at(n)) for n in range(num)])
    assert abs(found_mean - mean) < 5 * deviation / num**0.5
    assert abs(found_deviation / deviation - 1) < 0.1


def test_poisson_gaps_are_memoryless() -> None:
    mean, deviation = mean_and_deviation(gaps_s(ArrivalProcess(kind="poisson", rate=4), 10_000))
    assert abs(mean - 0.25) < 0.0125
    assert abs(deviation - 0.25) < 0.02


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gamma_gaps_have_their_variation(cv: float) -> None:
    mean, deviation = mean_and_deviation(gaps_s(ArrivalProcess(kind="gamma", rate=4, cv=cv), 20_000))
    assert abs(mean * 4 - 1) < 5 * cv / 20_000**0.5
    assert abs(deviation / mean / cv - 1) < 0.15


def test_constant_gaps_are_equal_and_do_not_drift() -> None:
    times = list(islice(ArrivalProcess(kind="constant", rate=3).times(0), 300_001))
    assert times[300_000] == 100_000 * SECOND
    assert {b - a for a, b in pairwise(times[:1000])} == {333_333_333, 333_333_334}


def test_bursts_keep_the_rate_and_leave_pauses() -> None:
    process = ArrivalProcess(kind="bursts", rate=5, on_s=2, off_s=8)
    times = list(takewhile(lambda t: t < 20_000 * SECOND, process.times(1)))
    assert abs(len(times) / 100_000 - 1) < 0.12
    occupied = len({t // SECOND for t in times})
    assert 0.2 < occupied / 20_000 < 0.4
    assert sum(b - a > 4 * SECOND for a, b in pairwise(times)) > 500


def test_diurnal_swings_as_a_sine() -> None:
    process = ArrivalProcess(kind="diurnal", rate=20, period_s=1000, amplitude=0.8)
    times = list(takewhile(lambda t: t < 4000 * SECOND, process.times(1)))
    quarters = Counter(t // (250 * SECOND) % 4 for t in times)
    high, low = quarters[0] + quarters[1], quarters[2] + quarters[3]
    assert abs(len(times) / 80_000 - 1) < 0.03
    assert abs(high / low - (1 + 0.8 * 2 / 3.1416) / (1 - 0.8 * 2 / 3.1416)) < 0.3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(SHAPES) - 1), st.integers(-5, 5))
def test_one_seed_makes_one_workload(index: int, seed: int) -> None:
    text = SHAPES[index].replace(",seed=3", "")
    requests = served(make_workload(text, seed=seed))
    assert requests == served(make_workload(f"{text},seed={seed}"))
    if index != 3:
        assert requests != served(make_workload(text, seed=seed + 1))


def test_the_hash_seed_changes_nothing() -> None:
    code = (
        "from octavo.sim.workload.spec import make_workload; import hashlib;"
        f"w = make_workload({SHAPES[2]!r}, ['rate=2.5', 'tenants=a:1+b:2', 'cancel=0.5:1:2', 'spread=auto']);"
        "print(hashlib.sha256(repr(list(w.arrivals())).encode()).hexdigest())"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    ]
    assert told[0] == told[1]
    assert len(told[0].strip()) == 64


def test_lengths_are_as_asked() -> None:
    workload = make_workload(
        "synthetic:constant,rate=5,n=4000,prompt=lognormal:1000:0.8,output=uniform:50:400,max_prompt=5000"
    )
    requests = list(workload.arrivals())
    prompts = sorted(r.num_prompt_tokens for r in requests)
    outputs = [r.num_output_tokens for r in requests]
    assert 930 < prompts[2000] < 1070
    assert max(prompts) == 5000
    assert (min(outputs), max(outputs)) == (50, 400)
    assert 218 < sum(outputs) / 4000 < 232


def test_lengths_come_from_a_trace(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i},{i},{2 * i}\n" for i in range(1, 9))
    )
    pairs = Counter(
        (r.num_prompt_tokens, r.num_output_tokens)
        for r in make_workload(f"synthetic:poisson,rate=1,n=800,lengths={path}").arrivals()
    )
    assert set(pairs) == {(i, 2 * i) for i in range(1, 9)}
    assert min(pairs.values()) > 60
    apart = list(
        make_workload(f"synthetic:poisson,rate=1,n=400,prompt=empirical:{path},output=empirical:{path}").arrivals()
    )
    assert {r.num_prompt_tokens for r in apart} == set(range(1, 9))
    assert {r.num_output_tokens for r in apart} == set(range(2, 17, 2))
    assert any(r.num_output_tokens != 2 * r.num_prompt_tokens for r in apart)


def test_system_prompts_are_common_and_popular_by_rank() -> None:
    workload = make_workload("synthetic:constant,rate=1,n=4000,groups=10,group_tokens=77,zipf=1,prompt=5,output=1")
    assert workload.has_shared_prefixes
    groups = Counter(r.segments[0] for r in workload.arrivals())
    assert set(groups) == {(group, 77) for group in range(10)}
    harmonic = sum(1 / rank for rank in range(1, 11))
    for group in range(10):
        assert abs(groups[group, 77] - 4000 / harmonic / (group + 1)) < 5 * (4000 / harmonic / (group + 1)) ** 0.5


def test_a_turn_holds_the_conversation_so_far_and_its_answers() -> None:
    by_session: dict[int, list[TraceRequest]] = {}
    for request in served(shape(2)):
        by_session.setdefault(request.session, []).append(request)
    assert {len(turns) for turns in by_session.values()} == {1, 2, 3, 4}
    for turns in by_session.values():
        assert turns[0].num_prompt_tokens == 50
        for earlier, later in pairwise(turns):
            assert later.segments[:-1] == (*earlier.segments, (earlier.answer_id, earlier.num_output_tokens))
            assert later.segments[-1][1] == 9
            assert later.arrival_ns >= earlier.arrival_ns + SECOND


def test_a_closed_loop_has_so_many_under_way_until_all_are_served() -> None:
    workload = make_workload("synthetic:closed,concurrency=4,n=23,think=0.5")
    assert workload.has_followers
    assert [r.arrival_ns for r in workload.arrivals()] == [0, 0, 0, 0]
    requests = served(workload, service_ns=2 * SECOND)
    assert len(requests) == 23
    assert Counter(r.arrival_ns for r in requests)[0] == 4
    assert requests[-1].arrival_ns == 5 * 2_500_000_000
    assert len(list(make_workload("synthetic:closed,concurrency=40,n=7").arrivals())) == 7


def test_a_closed_loop_of_conversations_serves_all_of_them() -> None:
    requests = served(shape(3))
    assert {r.session for r in requests} == set(range(20))
    assert len(requests) > 20


def test_a_duration_bounds_arrivals() -> None:
    times = [r.arrival_ns for r in make_workload("synthetic:poisson,rate=50,duration=10").arrivals()]
    assert 400 < len(times) < 600
    assert times[-1] < 10 * SECOND
    assert len(list(make_workload("synthetic:poisson,rate=50,duration=10,n=30").arrivals())) == 30
    with pytest.raises(InvalidWorkloadError, match=r"nothing arrives within 0\.001 s"):
        make_workload("synthetic:poisson,rate=0.001,duration=0.001")


def test_fewer_arrive_than_asked_for_when_the_duration_ends_first() -> None:
    workload = make_workload("synthetic:constant,rate=1,duration=5,n=1000")
    assert len(list(workload.arrivals())) == 5
    assert workload.content_ids.num_private == 10
