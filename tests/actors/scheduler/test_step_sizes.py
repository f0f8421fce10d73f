from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.scheduler.step_sizes import BOUNDS, StepSizes

sizes = st.sampled_from([1, 2, 3, 4, 5, 255, 256, 257, 16383, 16384, 16385, 10**6]) | st.integers(1, 40_000)


@given(st.lists(st.tuples(sizes, st.integers(0, 5))))
def test_each_step_is_counted_below_the_first_bound_that_it_does_not_pass(steps: list[tuple[int, int]]) -> None:
    counted = StepSizes()
    for num_tokens, num_steps in steps:
        counted.count(num_tokens, num_steps)
    below = [0, *BOUNDS, 10**9]
    assert counted.counts == [
        sum(num_steps for num_tokens, num_steps in steps if low < num_tokens <= high)
        for low, high in itertools.pairwise(below)
    ]
    assert counted.num_tokens == sum(num_tokens * num_steps for num_tokens, num_steps in steps)
