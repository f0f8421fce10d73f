"""Transforms of workloads: what each does, and what all of them keep."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workload_tools import SECOND, SHAPES, Recorded, served, shape

from octavo.messages.errors import InvalidWorkloadError
from octavo.sim.workload.content_ids import FIRST_PRIVATE_ID, content_ids_of
from octavo.sim.workload.cut import Faster, FirstRequests, TimeWindow
from octavo.sim.workload.marks import AssignPriorities, AssignTenants, SomeLeave
from octavo.sim.workload.request import TraceRequest, Workload
from octavo.sim.workload.reshape import ClampContext, LimitOutputs, ScaleLengths, SharedPrefix, cut_segments
from octavo.sim.workload.spec import apply_transform
from octavo.sim.workload.superpose import Superposed, scale_rate, superpose
from octavo.sim.workload.ticks import spread_ticks
from octavo.sim.workload.trace import read_trace

TRANSFORMS = [
    "first=7",
    "window=1:4",
    "speed=2",
    "rate=2.5",
    "rate=0.4",
    "rate=2:shared",
    "spread=auto",
    "context=300:cut",
    "context=300:drop",
    "context=300:refuse",
    "prompts=1.5",
    "outputs=0.5",
    "max_output=4",
    "prefix=33",
    "tenants=a:1+b:3",
    "priorities=0:9+5:1",
    "timeout=0.5:1:9",
    "cancel=0.3:0.1:2",
]
chains = st.lists(st.sampled_from(TRANSFORMS), max_size=3)


def transformed(index: int, chain: list[str], seed: int = 0) -> Workload:
    workload = shape(index)
    for transform in chain:
        workload = apply_transform(workload, transform, seed=seed)
    return workload


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(SHAPES) - 1), chains)
def test_whatever_the_chain_requests_are_whole_ordered_counted_and_the_same_again(index: int, chain: list[str]) -> None:
    workload = transformed(index, chain)
    arrivals = list(workload.arrivals())
    times = [r.arrival_ns for r in arrivals]
    assert times == sorted(times)
    assert all(time >= 0 for time in times)
    requests = served(workload)
    counts = workload.counts
    assert counts.num_requests == len(requests)
    assert counts.num_rows == counts.num_requests + sum(counts.num_skipped.values())
    ids = content_ids_of(workload)
    for request in requests:
        assert request.num_output_tokens >= 1
        assert request.segments and all(num_tokens >= 1 for _, num_tokens in request.segments)
        for content_id in [request.answer_id, *[run[0] for run in request.segments]]:
            is_private = content_id >= FIRST_PRIVATE_ID
            assert content_id < (FIRST_PRIVATE_ID + ids.num_private if is_private else ids.num_shared)
    answers = [r.answer_id for r in requests]
    assert len(set(answers)) == len(answers)
    assert served(workload) == requests
    assert served(transformed(index, chain)) == requests
    if not workload.has_shared_prefixes:
        first_ids = [r.segments[0][0] for r in requests]
        assert len(set(first_ids)) == len(first_ids)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(SHAPES) - 1), chains, st.randoms(use_true_random=False))
def test_followers_do_not_depend_on_the_order_in_which_they_are_asked(index: int, chain: list[str], random) -> None:
    if any(transform.startswith("window") for transform in chain):
        chain = []
    workload = transformed(index, chain)
    asked = list(workload.arrivals())
    in_order = {r.answer_id: list(workload.followers(r, 7 * SECOND)) for r in asked}
    random.shuffle(asked)
    assert {r.answer_id: list(workload.followers(r, 7 * SECOND)) for r in asked} == in_order


def test_the_first_requests_are_kept_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i},5,6\n" for i in range(20)))
    workload = FirstRequests(read_trace(path), 8)
    assert [r.arrival_ns for r in workload.arrivals()] == [i * SECOND for i in range(8)]
    assert workload.counts.num_rows == 20
    assert workload.counts.num_skipped == {"after the first 8": 12}
    twice = FirstRequests(FirstRequests(read_trace(path), 8), 3)
    assert len(list(twice.arrivals())) == 3
    assert twice.counts.num_rows == 20


def test_more_than_there_are_is_all(tmp_path: Path) -> None:
    workload = FirstRequests(shape(0), 10**6)
    assert list(workload.arrivals()) == list(shape(0).arrivals())
    assert workload.counts.num_skipped == {}


def test_a_window_counts_from_its_begin() -> None:
    base = Recorded(*[(i * SECOND, ((i, 5),), 6) for i in range(10)])
    workload = TimeWindow(base, 3 * SECOND, 6 * SECOND)
    assert [(r.arrival_ns, r.segments) for r in workload.arrivals()] == [(i * SECOND, ((i + 3, 5),)) for i in range(3)]
    assert workload.counts.num_skipped == {"before the window": 3, "after 3 s to 6 s": 4}
    assert workload.counts.num_rows == 10


def test_followers_after_the_window_do_not_come() -> None:
    workload = TimeWindow(shape(3), 0, 3 * SECOND)
    requests = served(workload)
    assert requests
    assert all(r.arrival_ns < 3 * SECOND for r in requests)
    assert len(requests) < len(served(shape(3)))


def test_faster_divides_gaps_and_think_times() -> None:
    base = Recorded((0, ((0, 5),), 6), (3 * SECOND, ((1, 5),), 6))
    assert [r.arrival_ns for r in Faster(base, 2).arrivals()] == [0, 3 * SECOND // 2]
    loop = shape(3)
    first = next(loop.arrivals())
    (slow,) = loop.followers(first, 10 * SECOND)
    (fast,) = Faster(loop, 4).followers(first, 10 * SECOND)
    assert fast.arrival_ns - 10 * SECOND == (slow.arrival_ns - 10 * SECOND) // 4 == SECOND // 4


@pytest.mark.parametrize("factor", [0.25, 1.0, 2.0, 3.5])
def test_a_rate_is_scaled_in_number_not_in_time_or_shape(factor: float) -> None:
    base = apply_transform(shape(0), "rate=50", seed=9)  # 3,000 requests
    scaled = scale_rate(base, factor, seed=1)
    before, after = list(base.arrivals()), list(scaled.arrivals())
    whole, part = divmod(factor, 1)
    expected, spread = len(before) * factor, 5 * (len(before) * part * (1 - part)) ** 0.5
    assert abs(len(after) - expected) <= spread
    assert after[-1].arrival_ns <= before[-1].arrival_ns * 1.01
    shapes = {(r.num_prompt_tokens, r.num_output_tokens) for r in before}
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in after} <= shapes
    if whole:
        assert shapes == {(r.num_prompt_tokens, r.num_output_tokens) for r in after}


def test_a_higher_rate_holds_every_request_of_a_lower_one() -> None:
    def told(factor: float) -> set[tuple[int, int]]:
        return {(r.arrival_ns, r.answer_id) for r in scale_rate(shape(0), factor, seed=5).arrivals()}

    rates = [0.3, 0.7, 1.0, 1.4, 1.9, 2.0, 2.6]
    for lower, higher in pairwise(rates):
        assert told(lower) < told(higher)


def test_copies_share_content_only_when_asked() -> None:
    base = Recorded((0, ((0, 512), (FIRST_PRIVATE_ID + 7, 9)), 6))
    apart = [r.segments for r in scale_rate(base, 2, seed=1).arrivals()]
    assert len({segments[0][0] for segments in apart}) == 2
    shared = [r.segments for r in scale_rate(base, 2, seed=1, is_content_shared=True).arrivals()]
    assert [segments[0] for segments in shared] == [(0, 512), (0, 512)]
    assert len({segments[1][0] for segments in shared}) == 2


def test_sessions_of_copies_are_apart_and_thinned_whole() -> None:
    base = shape(2)
    per_session: dict[int, int] = {}
    for request in served(base):
        per_session[request.session] = per_session.get(request.session, 0) + 1
    scaled = served(scale_rate(base, 2.5, seed=3))
    found: dict[int, int] = {}
    for request in scaled:
        found[request.session] = found.get(request.session, 0) + 1
    assert len(found) > 2 * len(per_session)
    allowed = sorted(per_session.values())
    assert all(num in allowed for num in found.values())


def test_a_later_turn_holds_the_copys_own_answers() -> None:
    scaled = scale_rate(shape(2), 3, seed=3)
    by_session: dict[int, list[TraceRequest]] = {}
    for request in served(scaled):
        by_session.setdefault(request.session, []).append(request)
    assert any(len(turns) > 1 for turns in by_session.values())
    for turns in by_session.values():
        for earlier, later in pairwise(turns):
            size = len(earlier.segments)
            assert later.segments[:size] == earlier.segments
            assert later.segments[size] == (earlier.answer_id, earlier.num_output_tokens)


def test_different_workloads_at_once_keep_their_contents_apart() -> None:
    both = superpose([shape(1), shape(2), Recorded((5, ((0, 9),), 4))])
    assert len(served(both)) == len(served(shape(1))) + len(served(shape(2))) + 1
    shared_of: dict[int, str] = {}
    for request in both.arrivals():
        kind = "recorded" if request.num_output_tokens == 4 else str(request.num_output_tokens)
        for content_id, _ in request.segments:
            assert shared_of.setdefault(content_id, kind) == kind
    with pytest.raises(InvalidWorkloadError, match="nothing to superpose"):
        superpose([])


def test_more_contents_than_ids_are_refused() -> None:
    base = Recorded((0, ((2**29, 5),), 1))
    Superposed([base], name="x")
    with pytest.raises(InvalidWorkloadError, match="superpose less"):
        scale_rate(base, 2, seed=0)
    assert list(scale_rate(base, 2, seed=0, is_content_shared=True).arrivals())
    with pytest.raises(InvalidWorkloadError, match="rate factor 0"):
        scale_rate(base, 0, seed=0)


@settings(deadline=None)
@given(st.integers(2, 50), st.integers(1, 60), st.integers(1, 60))
def test_cut_requests_fit_the_context_and_shorter_ones_stay(limit: int, num_prompt: int, num_output: int) -> None:
    base = Recorded((0, ((3, num_prompt),), num_output))
    (request,) = ClampContext(base, limit, "cut").arrivals()
    total = request.num_prompt_tokens + request.num_output_tokens
    if num_prompt + num_output <= limit:
        assert request == base.requests[0]
    else:
        assert total == limit
        assert request.num_prompt_tokens >= min(num_prompt, limit // 2)


def test_longer_than_the_context_is_counted_by_what_becomes_of_it() -> None:
    base = Recorded((0, ((0, 90),), 20), (1, ((1, 5),), 5))
    for policy, kept, skipped, changed in (
        ("refuse", [110, 10], {}, {"longer than 100 tokens: left for the engine to refuse": 1}),
        ("drop", [10], {"longer than 100 tokens": 1}, {}),
        ("cut", [100, 10], {}, {"cut to 100 tokens": 1}),
    ):
        workload = ClampContext(base, 100, policy)
        assert [r.num_prompt_tokens + r.num_output_tokens for r in workload.arrivals()] == kept
        assert (workload.counts.num_skipped, workload.counts.num_changed) == (skipped, changed)
        assert workload.counts.num_rows == 2


runs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=6).map(tuple)


@settings(deadline=None)
@given(runs, st.floats(0.01, 20))
def test_scaled_prompts_have_the_scaled_length_and_keep_common_beginnings(
    segments: tuple[tuple[int, int], ...], factor: float
) -> None:
    longer = (*segments, (9, 30))
    short, long = ScaleLengths(Recorded((0, segments, 1), (0, longer, 1)), prompts=factor).arrivals()
    total = sum(num_tokens for _, num_tokens in segments)
    assert short.num_prompt_tokens == max(1, round(total * factor))
    if round(total * factor) >= 1:
        assert long.segments[: len(short.segments)] == short.segments


@settings(deadline=None)
@given(runs, st.integers(1, 300))
def test_a_cut_prompt_is_the_beginning(segments: tuple[tuple[int, int], ...], num_tokens: int) -> None:
    def spelt(runs: tuple[tuple[int, int], ...]) -> list[int]:
        return [content_id for content_id, length in runs for _ in range(length)]

    assert spelt(cut_segments(segments, num_tokens)) == spelt(segments)[:num_tokens]


def test_outputs_are_bounded() -> None:
    workload = LimitOutputs(Recorded((0, ((0, 1),), 5), (0, ((0, 1),), 9)), 7)
    assert [r.num_output_tokens for r in workload.arrivals()] == [5, 7]
    assert workload.counts.num_changed == {"output cut to 7 tokens": 1}


def test_a_common_prefix_is_new_and_first() -> None:
    base = Recorded((0, ((4, 5),), 5), (0, ((6, 5),), 9))
    assert [r.segments for r in SharedPrefix(base, 100).arrivals()] == [((7, 100), (4, 5)), ((7, 100), (6, 5))]


def test_tenants_and_priorities_come_by_weight_and_stay_with_a_session() -> None:
    base = apply_transform(shape(0), "rate=50")
    requests = list(AssignTenants(base, {"a": 1, "b": 3}, seed=1).arrivals())
    share = sum(r.tenant == "b" for r in requests) / len(requests)
    assert 0.7 < share < 0.8
    priorities = [r.priority for r in AssignPriorities(base, {0: 0.9, -5: 0.1}, seed=1).arrivals()]
    assert 0.07 < priorities.count(-5) / len(priorities) < 0.13
    tenants: dict[int, str] = {}
    for request in served(AssignTenants(shape(2), {"a": 1, "b": 1}, seed=1)):
        assert tenants.setdefault(request.session, request.tenant) == request.tenant
    assert set(tenants.values()) == {"a", "b"}


def test_some_leave_within_their_time() -> None:
    base = apply_transform(shape(0), "rate=50")
    requests = list(SomeLeave(base, "cancel", chance=0.25, low_ns=SECOND, high_ns=3 * SECOND, seed=4).arrivals())
    leaving = [r.cancel_after_ns for r in requests if r.cancel_after_ns]
    assert 0.21 < len(leaving) / len(requests) < 0.29
    assert all(SECOND <= after < 3 * SECOND for after in leaving)
    assert 1.8 * SECOND < sum(leaving) / len(leaving) < 2.2 * SECOND
    assert {r.timeout_ns for r in SomeLeave(base, "timeout", chance=1, low_ns=7, high_ns=7, seed=4).arrivals()} == {7}


def test_another_seed_marks_other_requests() -> None:
    def marked(seed: int) -> list[str]:
        return [r.tenant for r in AssignTenants(shape(0), {"a": 1, "b": 1}, seed=seed).arrivals()]

    assert marked(1) == marked(1) != marked(2)


def test_ticks_are_spread_evenly_and_no_further_than_the_next() -> None:
    tick_ns = 3 * SECOND
    base = Recorded(*[(tick * tick_ns, ((tick, 5),), 6) for tick in (0, 1, 2, 3, 7) for _ in range(40)])
    workload = spread_ticks(base, seed=2)
    requests = list(workload.arrivals())
    parts = [r.arrival_ns - r.segments[0][0] * tick_ns for r in requests]
    assert all(0 <= part < tick_ns for part in parts)
    assert 0.4 < sum(parts) / len(parts) / tick_ns < 0.6
    assert len(set(parts)) == len(parts)
    assert list(spread_ticks(base, seed=3).arrivals()) != requests
    assert list(spread_ticks(base, seed=2).arrivals()) == requests


def test_a_shorter_gap_than_the_tick_bounds_the_spread() -> None:
    base = Recorded((0, ((0, 1),), 1), (5, ((1, 1),), 1), (1000, ((2, 1),), 1))
    for seed in range(50):
        first, second, third = spread_ticks(base, seed=seed, tick_ns=100).arrivals()
        assert 0 <= first.arrival_ns < 5 <= second.arrival_ns < 105
        assert 1000 <= third.arrival_ns < 1100
    with pytest.raises(InvalidWorkloadError, match="not positive"):
        spread_ticks(base, seed=1, tick_ns=0)
    assert [r.arrival_ns for r in spread_ticks(Recorded((7, ((0, 1),), 1)), seed=1).arrivals()] == [7]


def test_impossible_numbers_are_refused() -> None:
    base = shape(0)
    for make in (
        lambda: FirstRequests(base, 0),
        lambda: TimeWindow(base, 5, 5),
        lambda: TimeWindow(base, -1, 5),
        lambda: Faster(base, 0),
        lambda: ClampContext(base, 1, "cut"),
        lambda: ScaleLengths(base, prompts=0),
        lambda: LimitOutputs(base, 0),
        lambda: SharedPrefix(base, 0),
        lambda: AssignTenants(base, {}, seed=0),
        lambda: AssignTenants(base, {"a": 0}, seed=0),
        lambda: AssignTenants(base, {"a": float("nan")}, seed=0),
        lambda: SomeLeave(base, "cancel", chance=2, low_ns=1, high_ns=1, seed=0),
        lambda: SomeLeave(base, "cancel", chance=1, low_ns=2, high_ns=1, seed=0),
    ):
        with pytest.raises(InvalidWorkloadError):
            make()
