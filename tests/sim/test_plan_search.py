"""The planner's searches, held against a scan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo.sim.plan.search import largest, smallest


@given(st.integers(-60, 60), st.integers(0, 120), st.integers(-20, 150), st.none() | st.integers(-80, 80))
def test_the_smallest_is_a_scans_answer_wherever_it_begins(
    at_least: int, length: int, threshold: int, start: int | None
) -> None:
    at_most = at_least + length
    asked: list[int] = []

    def passes(number: int) -> bool:
        asked.append(number)
        return number >= threshold

    scanned = next((number for number in range(at_least, at_most + 1) if number >= threshold), None)
    assert smallest(passes, at_least=at_least, at_most=at_most, start=start) == scanned
    assert len(asked) == len(set(asked)) and all(at_least <= number <= at_most for number in asked)


@given(st.integers(-60, 60), st.integers(0, 120), st.integers(-20, 150), st.none() | st.integers(-80, 80))
def test_the_largest_is_a_scans_answer_wherever_it_begins(
    at_least: int, length: int, threshold: int, start: int | None
) -> None:
    at_most = at_least + length
    scanned = max((number for number in range(at_least, at_most + 1) if number <= threshold), default=None)
    assert largest(lambda number: number <= threshold, at_least=at_least, at_most=at_most, start=start) == scanned


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_among_few_numbers_no_order_of_passes_and_fails_hides_one_below_the_answer(pattern: list[bool]) -> None:
    answer = smallest(lambda number: pattern[number - 1], at_least=1, at_most=len(pattern))
    if answer is not None:
        assert pattern.index(True) + 1 == answer


def test_a_dent_next_to_a_large_answer_is_found() -> None:
    assert smallest(lambda number: number >= 40 or number == 38, at_least=1, at_most=100) == 38


def test_a_search_asks_for_few() -> None:
    asked: list[int] = []

    def passes(number: int) -> bool:
        asked.append(number)
        return number >= 700

    assert smallest(passes, at_least=1, at_most=1000, start=650) == 700
    assert len(asked) <= 18
