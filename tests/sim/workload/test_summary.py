"""The summary of a workload, against figures found by other means."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given, settings
from hypothesis import strategies as st
from workload_tools import SECOND, Recorded, served, shape

from octavo.sim.workload.summary import describe

prompts = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=5).map(tuple)


def common(first: list[int], second: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@settings(deadline=None)
@given(st.lists(prompts, min_size=1, max_size=8))
def test_the_shareable_share_is_that_of_runs_compared_one_by_one(segments: list[tuple[tuple[int, int], ...]]) -> None:
    # Adjacent runs of one content are one run to a tree of runs; traces have none, so merge them.
    merged = []
    for prompt in segments:
        runs: list[list[int]] = []
        for content_id, length in prompt:
            if runs and runs[-1][0] == content_id:
                runs[-1][1] += length
            else:
                runs.append([content_id, length])
        merged.append(tuple((content_id, length) for content_id, length in runs))
    spelt = [[content_id for content_id, length in prompt for _ in range(length)] for prompt in merged]
    shared = sum(
        max((common(later, earlier) for earlier in spelt[:place]), default=0) for place, later in enumerate(spelt)
    )
    summary = describe(Recorded(*[(0, prompt, 1) for prompt in merged]))
    assert summary.shareable_prompt_share == shared / sum(map(len, spelt))


def test_figures_of_a_workload_by_hand() -> None:
    arrivals_s = [0, 10, 61, 62, 63, 119, 200]
    base = Recorded(*[(t * SECOND, ((place, place + 1),), 10 - place) for place, t in enumerate(arrivals_s)])
    summary = describe(base)
    assert (summary.num_requests, summary.span_s, summary.request_rate) == (7, 200, 7 / 200)
    assert (summary.busiest_minute_requests, summary.busiest_minute_begin_s) == (4, 10)
    assert (summary.prompt.total, summary.prompt.min, summary.prompt.max) == (28, 1, 7)
    assert (summary.prompt.p50, summary.prompt.p90, summary.prompt.p99) == (4, 7, 7)
    assert summary.prompt.mean == 4
    assert (summary.output.min, summary.output.p50, summary.output.max) == (4, 7, 10)
    assert summary.shareable_prompt_share == 0
    assert summary.counts.num_requests == 7


def test_percentiles_are_the_nearest_rank() -> None:
    base = Recorded(*[(0, ((place, place),), 1) for place in range(1, 101)])
    assert (describe(base).prompt.p50, describe(base).prompt.p90, describe(base).prompt.p99) == (50, 90, 99)


def test_followers_are_part_of_a_summary() -> None:
    summary = describe(shape(2))
    requests = served(shape(2))
    assert summary.num_requests == len(requests)
    assert summary.num_sessions == 20
    assert summary.prompt.total == sum(r.num_prompt_tokens for r in requests)
    assert summary.counts.num_requests == len(requests)


def test_one_request_has_no_rate() -> None:
    summary = describe(Recorded((5, ((0, 3),), 1)))
    assert (summary.span_s, summary.request_rate, summary.prompt.p99) == (0, 0, 3)
