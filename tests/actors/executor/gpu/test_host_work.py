"""How much Python a step is, in lines executed: what grows with the batch must be C's, or the host is late at 256 rows.

Wall-clock says the same only on a quiet machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from octavo.actors.executor.gpu.bench_host import HostLoop
from octavo.messages.ids import RequestId
from octavo.messages.request import SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep

FEW, MANY = 12, 108
_PROMPT = bytes(4 * 99)


class StandingClock:
    """Waits by being set, so that no loop waits."""

    def __init__(self) -> None:
        self.at_ns = 0

    def now_ns(self) -> int:
        return self.at_ns

    def wait_until(self, at_ns: int) -> None:
        self.at_ns = max(self.at_ns, at_ns)


class EqualRequests(HostLoop):
    """All prompts are equally long, so that rows need their blocks in few of the steps."""

    def _make_request(self) -> SubmitRequest:
        max_tokens = self._chance.randint(*self._output_tokens)
        params = SamplingParams(temperature=0.6, seed=0, max_tokens=max_tokens, ignore_eos=True)
        self._next_id += 1
        return SubmitRequest(RequestId(self._next_id), _PROMPT, params)


@contextmanager
def counted_lines() -> Iterator[Callable[[], int]]:
    """How many lines of Python this thread has executed; a turn of a loop is one at least."""
    count = 0

    def on_line(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return on_line

    before = sys.gettrace()
    sys.settrace(on_line)
    try:
        yield lambda: count
    finally:
        sys.settrace(before)


def lines_of_steps(num_running: int, output_tokens: tuple[int, int], num_steps: int) -> list[tuple[int, ExecuteStep]]:
    """Lines of each lap, from the tokens of one step to the launch of the next, and the step that is launched in it."""
    loop = EqualRequests(num_running=num_running, output_tokens=output_tokens, step_ns=1000, clock=StandingClock())
    loop.run(30)  # prompts, and what is done once
    found: list[tuple[int, ExecuteStep]] = []
    launch = loop._runner.launch
    with counted_lines() as num_lines:
        last = num_lines()

        def launched(step: ExecuteStep) -> Any:
            nonlocal last
            result = launch(step)
            found.append((num_lines() - last, step))
            last = num_lines()
            return result

        loop._runner.launch = launched  # type: ignore[method-assign]
        loop.run(num_steps)
    return found[1:]


def test_lines_are_counted_with_every_turn_of_a_loop() -> None:
    """Or the tests below would prove nothing."""

    def lines_of(count: int) -> int:
        rows = list(range(count))
        with counted_lines() as num_lines:
            before = num_lines()
            [row + 1 for row in rows if row]
            return num_lines() - before

    assert lines_of(MANY) - lines_of(FEW) >= MANY - FEW


def test_a_step_in_which_nothing_changes_is_as_many_lines_whatever_the_rows() -> None:
    lines = {}
    for num_running in (FEW, MANY):
        steps = lines_of_steps(num_running, (500, 500), 64)
        assert {len(step.request_ids) for _, step in steps} == {num_running}
        quiet = [count for count, step in steps if not (step.append_blocks or step.start or step.drop)]
        assert len(quiet) > 20
        lines[num_running] = sorted(quiet)[len(quiet) // 2]
    assert abs(lines[MANY] - lines[FEW]) < 10
    assert lines[MANY] < 600


@pytest.mark.parametrize("what", ["start", "drop"])
def test_what_comes_and_goes_costs_lines_but_no_pass_over_those_that_stay(what: str) -> None:
    lines = {}
    for num_running in (FEW, MANY):
        # Each ends at a step of its own, so that in some steps one comes or goes and nothing else is done.
        steps = lines_of_steps(num_running, (20, 20 * num_running), 120)
        changes = [count for count, step in steps if len(getattr(step, what)) == 1 and len(step.append_blocks) <= 1]
        assert changes
        lines[num_running] = min(changes)
    # Where a row left is found in halves: a few lines more for eight times the rows.
    assert lines[MANY] - lines[FEW] < (MANY - FEW) // 2
