"""Workloads by a text: what is understood, and what is said about what is not."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workload_tools import SHAPES, shape

from octavo.messages.errors import InvalidTraceError, InvalidWorkloadError, OctavoError
from octavo.sim.workload.spec import TRANSFORMS, apply_transform, make_workload


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("synthetic:poison,rate=5", "unknown kind of arrivals 'poison': did you mean 'poisson'"),
        ("synthetic:", "unknown kind of arrivals ''"),
        ("synthetic:poisson", "needs rate=NUMBER"),
        ("synthetic:poisson,rate=5", "never end: give n"),
        ("synthetic:poisson,rat=5,n=3", "unknown key of synthetic:poisson 'rat': did you mean 'rate'"),
        ("synthetic:poisson,rate=5,n=3,cv=2", "unknown key of synthetic:poisson 'cv'"),
        ("synthetic:poisson,rate=5,n=3,n=4", "n is given twice"),
        ("synthetic:poisson,rate=5,n", "'n' is not KEY=VALUE"),
        ("synthetic:poisson,rate=5,,n=3", "'' is not KEY=VALUE"),
        ("synthetic:poisson,rate=x,n=3", "rate='x' is not a number"),
        ("synthetic:poisson,rate=-1,n=3", "rate=-1 must be at least 1e-06"),
        ("synthetic:poisson,rate=nan,n=3", "rate=nan must be"),
        ("synthetic:poisson,rate=1,n=2.5", "n=2.5 must be a whole number"),
        ("synthetic:poisson,rate=1,n=0", "n=0 must be at least 1"),
        ("synthetic:poisson,rate=1,n=3,prompt=lognorml:3:1", "'lognorml': did you mean 'lognormal'"),
        ("synthetic:poisson,rate=1,n=3,prompt=lognormal:3", "lognormal has 2 number"),
        ("synthetic:poisson,rate=1,n=3,prompt=0", "prompt=0 must be at least 1"),
        ("synthetic:poisson,rate=1,n=3,prompt=2.5", "prompt=2.5 must be a whole number"),
        ("synthetic:poisson,rate=1,n=3,prompt=uniform:9:3", "prompt=3 must be at least 9"),
        ("synthetic:poisson,rate=1,n=3,prompt=uniform:1:3.5", "from one whole number to another"),
        ("synthetic:poisson,rate=1,n=3,prompt=empirical", "name the trace"),
        ("synthetic:poisson,rate=1,n=3,turns=2,think=empirical:x", "give another form"),
        ("synthetic:poisson,rate=1,n=3,turns=101", "at most 100 turns"),
        ("synthetic:poisson,rate=1,n=3,think=5", "think is about conversations"),
        ("synthetic:poisson,rate=1,n=3,zipf=1", "zipf is about groups"),
        ("synthetic:poisson,rate=1,n=3,groups=3", "needs both groups and group_tokens"),
        ("synthetic:poisson,rate=1,n=3,lengths=x,prompt=5", "leave out it or prompt"),
        ("synthetic:poisson,rate=1,n=2e9", "more than 536870912 requests"),
        ("synthetic:closed,n=5", "needs concurrency=NUMBER"),
        ("synthetic:closed,concurrency=5", "ends after n requests: give n"),
        ("synthetic:closed,concurrency=5,duration=5", "not after a duration"),
        ("synthetic:diurnal,rate=1,n=5,amplitude=2", "amplitude=2 must be"),
    ],
)
def test_a_malformed_description_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InvalidWorkloadError, match=message):
        make_workload(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spede=2", "unknown transform 'spede': did you mean 'speed'"),
        ("speed", "'speed' is not NAME=VALUE"),
        ("speed=0", "speed=0 must be at least"),
        ("first=many", "first='many' is not a number"),
        ("window=5", "window=5 is not BEGIN:END"),
        ("window=5:2", "is empty"),
        ("rate=2:share", "unknown mode of rate 'share': did you mean 'shared'"),
        ("context=100", "say what becomes of longer ones"),
        ("context=100:cutt", "did you mean 'cut'"),
        ("tenants=a", "not CHOICE:WEIGHT"),
        ("tenants=a:1+a:2", "each choice once"),
        ("tenants=a:0", "one of them above"),
        ("priorities=high:1", "priorities='high' is not a number"),
        ("timeout=0", "timeout=0 must be above 0"),
        ("timeout=1:2", "is not SECONDS or CHANCE:FROM:TO"),
        ("cancel=2:1:2", "cancel=2 must be"),
        ("spread=0", "spread=0 must be above 0"),
    ],
)
def test_a_malformed_transform_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InvalidWorkloadError, match=message):
        make_workload(SHAPES[0], [text])


def test_files_that_are_not_there_are_trace_errors(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    for text in (str(missing), f"synthetic:poisson,rate=1,n=3,lengths={missing}"):
        with pytest.raises(InvalidTraceError, match="no such file"):
            make_workload(text)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["poisson", "gamma", "bursts", "diurnal", "constant", "closed"]),
    st.lists(
        st.tuples(
            st.sampled_from(["n", "rate", "cv", "prompt", "turns", "think", "groups", "group_tokens", "concurrency"]),
            st.one_of(
                st.integers(-3, 50).map(str),
                st.floats().map(str),
                st.sampled_from(
                    ["uniform:1:5", "lognormal:5:1", "exponential:3", ":", "fixed:", "1e400", "empirical:"]
                ),
            ),
        ),
        max_size=6,
    ),
)
def test_any_description_is_a_workload_or_a_clear_refusal(kind: str, pairs: list[tuple[str, str]]) -> None:
    text = f"synthetic:{kind}" + "".join(f",{key}={value}" for key, value in {"n": "5", **dict(pairs)}.items())
    try:
        workload = make_workload(text)
    except OctavoError as error:
        assert str(error)
    else:
        times = [r.arrival_ns for r in islice(workload.arrivals(), 50)]
        assert times == sorted(times)
        assert times


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TRANSFORMS)), st.text("0123456789.:+-ae", max_size=8))
def test_any_transform_is_a_workload_or_a_clear_refusal(name: str, value: str) -> None:
    if name == "rate":
        value = value[:2]  # thousands of copies are right, but slow
    try:
        workload = apply_transform(shape(0), f"{name}={value}")
    except InvalidWorkloadError as error:
        assert str(error)
    else:
        times = [r.arrival_ns for r in workload.arrivals()]
        assert times == sorted(times)


def test_transforms_are_applied_in_turn() -> None:
    assert len(list(make_workload(SHAPES[0], ["first=10", "rate=2"]).arrivals())) == 20
    assert len(list(make_workload(SHAPES[0], ["rate=2", "first=10"]).arrivals())) == 10


def test_a_window_may_be_open() -> None:
    assert len(list(make_workload(SHAPES[0], ["window=:"]).arrivals())) == 60
    late = list(make_workload(SHAPES[0], ["window=5:"]).arrivals())
    assert 0 < len(late) < 60
    assert late[0].arrival_ns < 2 * 10**9


def test_the_name_tells_what_was_done() -> None:
    assert make_workload(SHAPES[0], ["first=10", "speed=2"]).name == f"{SHAPES[0]}, the first 10, 2 times as fast"
