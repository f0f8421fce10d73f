"""Charts: what is drawn lies inside, and nothing hostile gets out."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.sim.report.figures import seconds, share
from octavo.sim.report.svg import Axis, Reference, Series, chart, log_ticks, peaks, thinned, ticks

values = st.floats(-1e9, 1e12, allow_nan=False) | st.just(math.nan) | st.just(math.inf)


def numbers_of(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]


@given(
    st.lists(st.tuples(values, values), max_size=30),
    st.sampled_from(["line", "step", "area", "points", "ring"]),
    st.booleans(),
    st.booleans(),
    st.lists(st.builds(Reference, st.sampled_from(["x", "y"]), values, st.just("limit")), max_size=3),
)
def test_whatever_is_drawn_is_well_formed_and_lies_in_the_picture(
    points: list[tuple[float, float]], kind: str, is_log_x: bool, is_log_y: bool, references: list[Reference]
) -> None:
    text = chart(
        [Series(name="one", points=points, kind=kind)],  # type: ignore[arg-type]  # one of its literals
        Axis(label="x", is_log=is_log_x),
        Axis(label="y", is_log=is_log_y, text=seconds),
        description="test",
        references=references,
        width=500,
        height=200,
    )
    root = ElementTree.fromstring(text)
    for element in root.iter():
        for name, limit in (("x", 500), ("x1", 500), ("x2", 500), ("cx", 500), ("y", 200), ("cy", 200)):
            if name in element.attrib and element.tag != "text":
                assert -1 <= float(element.attrib[name]) <= limit + 1
        assert "nan" not in element.attrib.get("d", "") and "inf" not in element.attrib.get("d", "")


def test_texts_are_escaped() -> None:
    evil = '<script>alert(1)</script>"&'
    text = chart(
        [
            Series(name=evil, points=[(1, 1), (2, 2)], notes=[evil, evil]),
            Series(name=evil, points=[(1, 1)], kind="points", notes=[evil]),
        ],
        Axis(label=evil, text=lambda value: evil),
        Axis(label=evil),
        description=evil,
        references=[Reference("y", 1.5, evil)],
    )
    assert "<script" not in text
    ElementTree.fromstring(f"<div>{text}</div>")


def test_nothing_to_draw_is_said() -> None:
    assert "Nothing to draw" in chart([Series(name="a", points=[])], Axis(label="x"), Axis(label="y"), description="")


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_ticks_are_few_even_and_inside(lowest: float, span: float, count: int) -> None:
    found = ticks(lowest, lowest + span, count)
    assert len(found) <= count + 2
    assert all(lowest - 1e-6 * span <= value <= lowest + span * (1 + 1e-6) for value in found)
    assert found == sorted(set(found))


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e9), st.integers(3, 10))
def test_ticks_of_a_logarithmic_axis_are_few_and_inside(lowest: float, factor: float, count: int) -> None:
    found = log_ticks(lowest, lowest * factor, count)
    assert found and len(found) <= 2 * count + 4
    assert all(0.999 * lowest <= value <= 1.001 * lowest * factor for value in found)


def test_a_distribution_begins_low_and_ends_at_all() -> None:
    assert thinned([1.0, 2.0, 3.0]) == [(1.0, 1 / 3), (2.0, 2 / 3), (3.0, 1.0)]
    long = thinned([float(i) for i in range(10_000)], most=50)
    assert len(long) == 50 and long[0] == (0.0, 1e-4) and long[-1] == (9999.0, 1.0)


def test_thinning_a_line_keeps_its_peak() -> None:
    points = [(float(i), 1.0) for i in range(5000)]
    points[1234] = (1234.0, 99.0)
    kept = peaks(points, most=100)
    assert len(kept) <= 100 and (1234.0, 99.0) in kept and kept == sorted(kept)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 s"), (8.5e-4, "850 µs"), (0.04213, "42.1 ms"), (0.99999, "1.00 s"), (1.2, "1.20 s"), (119.0, "119 s"),
        (250.0, "4.17 min"), (9000.0, "2.50 h"), (math.nan, "–"), (math.inf, "∞"),
    ],
)  # fmt: skip
def test_seconds_are_written_with_their_unit(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 %"), (0.0001, "<0.1 %"), (0.5, "50 %"), (0.9999, ">99.9 %"), (1.0, "100 %")]
)
def test_a_share_that_is_not_all_is_not_called_all(value: float, text: str) -> None:
    assert share(value) == text
