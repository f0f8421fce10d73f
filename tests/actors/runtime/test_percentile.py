from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.runtime.percentile import percentile


@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[int], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values) or found == min(values)


def test_of_a_hundred_values_the_99th_percentile_is_the_99th() -> None:
    assert percentile(range(1, 101), 0.99) == 99
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize("percent", range(1, 101))
def test_shares_that_are_not_exact_in_binary_take_no_rank_too_many(percent: int) -> None:
    assert percentile(range(1, 101), percent / 100) == percent


@pytest.mark.parametrize("percent", [99, 50, 1.5, -0.1, math.nan])
def test_a_percent_is_no_share(percent: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        percentile([1, 2, 3], percent)
