"""Each fault of the list for an actor graph, F-01 to F-62, has a test that names it, or a reason why there is none."""

from __future__ import annotations

import pytest
from named_tests import names_with

NOT_THERE = {
    25: "no answer is bound to a grammar: there is no matcher that could fail, and `response_format` is refused",
    60: "no adapters are loaded: a request that names one is refused, so there is none to replace",
}


@pytest.mark.parametrize("number", range(1, 63))
def test_each_fault_has_a_test_that_carries_its_number_or_a_reason(number: int) -> None:
    named = names_with(f"f_{number:02}")
    assert bool(named) != (number in NOT_THERE), named or "no test carries it"
