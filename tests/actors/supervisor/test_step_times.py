from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.supervisor.step_times import StepTimes

MS = 1_000_000
FIRST_NS = 120_000 * MS
OLD = 1000  # progress of an executor that has long been running

durations = st.integers(1, 10_000 * MS)
sizes = st.integers(1, 8192)


def test_the_first_step_of_all_has_a_limit_of_its_own() -> None:
    assert StepTimes(FIRST_NS).limit_ns(2048, 0) == FIRST_NS


def test_a_hang_among_steps_of_up_to_200_ms_is_found_within_3_s() -> None:
    times = StepTimes(FIRST_NS)
    for _ in range(20):
        times.observe(64, 200 * MS, OLD)
    assert times.limit_ns(64, OLD) == 3000 * MS


@given(sizes, st.lists(durations, min_size=8, max_size=100))
def test_steps_that_become_ten_times_as_slow_are_not_taken_for_hung(num_tokens: int, seen: list[int]) -> None:
    times = StepTimes(FIRST_NS)
    for duration_ns in seen:
        times.observe(num_tokens, duration_ns, OLD)
    assert times.limit_ns(num_tokens, OLD) > 10 * max(seen), "of up to 100 steps, the 99th percentile is the longest"


@given(durations, sizes, sizes)
def test_a_prefill_may_take_as_long_as_its_tokens_would_one_by_one_the_first_time(
    ns: int, seen: int, more: int
) -> None:
    times = StepTimes(FIRST_NS)
    times.observe(seen, ns, OLD)
    assert times.limit_ns(seen + more, OLD) >= 10 * ns * (seen + more) // (2 * seen)
    assert times.limit_ns(max(1, seen // 2), OLD) >= 10 * ns


def test_one_slow_step_among_many_does_not_raise_the_limit_and_a_new_executors_first_steps_are_remembered() -> None:
    times = StepTimes(FIRST_NS)
    times.observe(8, 5000 * MS, 1)  # compiles
    for _ in range(127):
        times.observe(8, 10 * MS, OLD)
    assert times.limit_ns(8, OLD) == 1100 * MS
    assert times.limit_ns(8, 3) == 51_000 * MS, "the next incarnation compiles, too"
