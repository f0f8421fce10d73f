import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls as scipy_nnls

from octavo.sim.step_time.nnls import nnls


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(0, 40))
def test_it_finds_the_least_squares_that_scipy_finds(seed: int, num_columns: int, num_more_rows: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(num_columns + num_more_rows, num_columns)) * 10.0 ** rng.integers(-6, 6, num_columns)
    target = rng.normal(size=len(matrix))
    ours, (theirs, residual) = nnls(matrix, target), scipy_nnls(matrix, target)
    assert (ours >= 0.0).all()
    assert np.linalg.norm(matrix @ ours - target) <= residual * (1 + 1e-6) + 1e-8, theirs


def test_what_can_be_met_exactly_is() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.random((30, 4))
    truth = np.array([3.0, 0.0, 1e-3, 50.0])
    assert nnls(matrix, matrix @ truth) == pytest.approx(truth, abs=1e-5)


def test_columns_of_zeros_and_equal_columns_do_no_harm() -> None:
    matrix = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [3.0, 3.0, 0.0]])
    found = nnls(matrix, np.array([2.0, 4.0, 6.0]))
    assert found[2] == 0.0
    assert found[:2].sum() == pytest.approx(2.0)
    assert nnls(np.zeros((3, 0)), np.ones(3)).shape == (0,)
