import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.sim.step_time.tables.grid import Curve, Grid

points = st.lists(
    st.tuples(st.integers(0, 1000).map(float), st.floats(0, 1e6)), min_size=1, max_size=12, unique_by=lambda p: p[0]
)


@given(points)
def test_a_curve_goes_through_its_points(measured: list[tuple[float, float]]) -> None:
    curve = Curve(measured)
    assert [curve.at(x) for x, _ in measured] == [y for _, y in measured]
    assert (curve.low, curve.high) == (min(x for x, _ in measured), max(x for x, _ in measured))


@given(points, st.lists(st.floats(0, 5000), max_size=20))
def test_many_at_once_equal_one_by_one_bit_for_bit(measured: list[tuple[float, float]], xs: list[float]) -> None:
    curve = Curve(measured)
    assert curve.at_many(np.array(xs, dtype=np.float64)).tolist() == [curve.at(x) for x in xs]


def test_a_curve_is_linear_between_clamped_below_and_goes_on_above() -> None:
    curve = Curve([(10, 100), (20, 300), (40, 500)])
    assert [curve.at(x) for x in (0, 10, 15, 30)] == [100, 100, 200, 400]
    assert curve.at(60) == 500 + 20 * 10  # the line from 20, half of the last, to 40


def test_a_curve_that_ends_in_noise_does_not_fall_beyond() -> None:
    curve = Curve([(1, 10), (100, 50), (200, 40)])
    assert curve.at(1000) == 40


def test_equal_points_count_with_their_mean_and_none_is_refused() -> None:
    assert Curve([(1, 10), (1, 20)]).at(1) == 15
    with pytest.raises(ValueError, match="at least one point"):
        Curve([])
    with pytest.raises(ValueError, match="at least one point"):
        Grid({})


def linear(point: tuple[float, ...]) -> float:
    a, b, c = point
    return 5 + 2 * a + 3 * b + 7 * c + 0.5 * a * b * c


AXES = ([1, 4, 10], [0, 5, 20, 50], [2, 3])
FULL = {point: linear(point) for point in product(*AXES)}


@given(st.tuples(st.floats(1, 10), st.floats(0, 50), st.floats(2, 3)))
def test_a_grid_is_exact_for_what_is_multilinear(point: tuple[float, float, float]) -> None:
    assert Grid(FULL).at(point) == pytest.approx(linear(point))


def test_a_grid_is_clamped_below_and_goes_on_above() -> None:
    grid = Grid(FULL)
    assert grid.at((0, -5, 1)) == linear((1, 0, 2))
    assert grid.at((20, 100, 3)) == pytest.approx(linear((20, 100, 3)))
    falling = Grid({(1,): 10.0, (2,): 8.0})
    assert falling.at((100,)) == 8.0


@given(st.integers(0, 1000))
def test_holes_inside_are_filled_from_what_was_measured(seed: int) -> None:
    rng = random.Random(seed)
    inner = [point for point in FULL if point[1] in (5, 20)]
    missing = rng.sample(inner, rng.randint(1, 4))
    grid = Grid({point: value for point, value in FULL.items() if point not in missing})
    for point, value in FULL.items():
        assert grid.at(point) == pytest.approx(value)
        assert not grid.outside(point)


def test_two_grids_laid_over_each_other_become_one() -> None:
    """LLMServingSim measures one grid in powers of two and one in powers of 1.5."""
    first = {(a, b): 3.0 * a + b for a, b in product((0, 16, 32, 64), (0, 100, 400))}
    second = {(a, b): 3.0 * a + b for a, b in product((0, 24, 54, 64), (0, 150, 300, 400))}
    grid = Grid({**first, **second})
    assert grid.num_measured == len({**first, **second})
    for a, b in product((0, 16, 20, 24, 40, 54, 64), (0, 100, 130, 150, 300, 350)):
        assert grid.at((a, b)) == pytest.approx(3.0 * a + b)
        assert not grid.outside((a, b))


def test_a_corner_that_was_not_measured_goes_on_by_the_line_and_counts_as_outside() -> None:
    measured = {(rows, kv): 10.0 + 2.0 * rows + kv for rows in (1, 8, 64) for kv in (1, 128, 1024) if rows * kv <= 8192}
    assert (64, 1024) not in measured
    grid = Grid(measured)
    assert grid.at((64, 1024)) == pytest.approx(10 + 128 + 1024)
    assert grid.outside((64, 1024))
    assert grid.outside((10, 1000))  # between measured points and the one that was not
    assert not grid.outside((8, 1024))
    assert not grid.outside((64, 128))
    assert grid.outside((65, 1))


def test_a_curve_along_an_axis_holds_the_other_coordinates() -> None:
    curve = Grid(FULL).curve((4, 0, 2.5), 1)
    assert curve.xs == [0, 5, 20, 50]
    assert curve.at(10) == pytest.approx(linear((4, 10, 2.5)))
