"""How much work a step is for the host, in lines of Python executed and in operations on arrays.

Lines that grow with the batch must be C's, or the host is late at 256 rows; and as an operation on an array costs what
ten lines do, however short it is, those are counted too.

Wall-clock says the same only on a quiet machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest

from octavo.actors.executor.gpu.bench_host import HostLoop
from octavo.messages.ids import RequestId
from octavo.messages.request import SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep

FEW, MANY = 12, 108
SAME_ROWS, OTHER_ROWS, CHUNK = 16, 24, 20  # operations on arrays
_PROMPT = bytes(4 * 99)

Counted = Callable[[], AbstractContextManager[Callable[[], int]]]


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


class CountedArray(np.ndarray):
    """Counts what is done to it and to its parts."""

    num_operations = 0

    def __getitem__(self, key: Any) -> Any:
        CountedArray.num_operations += 1
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        CountedArray.num_operations += 1
        self.view(np.ndarray)[key] = value

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        CountedArray.num_operations += 1
        plain = [each.view(np.ndarray) if isinstance(each, CountedArray) else each for each in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(each.view(np.ndarray) for each in kwargs["out"])
        result = getattr(ufunc, method)(*plain, **kwargs)
        return self if "out" in kwargs else result


@contextmanager
def counted_operations() -> Iterator[Callable[[], int]]:
    """How many operations on arrays the packing of steps has taken: numpy's functions, slices, sums."""
    CountedArray.num_operations = 0

    def on_call(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or frame.f_code.co_filename == CountedArray.__getitem__.__code__.co_filename:
            return  # what `CountedArray` itself calls is counted there
        is_function = (getattr(called, "__module__", None) or "").startswith("numpy")
        CountedArray.num_operations += is_function or isinstance(getattr(called, "__self__", None), np.ndarray)

    sys.setprofile(on_call)
    try:
        yield lambda: CountedArray.num_operations
    finally:
        sys.setprofile(None)


def watch_arrays(loop: HostLoop) -> None:
    """Let the arrays that steps are packed from and to be counted."""
    decodes = loop._runner._batch._decodes
    for name in ("_sheet", "_steps", "_words", "_words_of_steps"):
        setattr(decodes, name, getattr(decodes, name).view(CountedArray))
    for staging in loop._runner._staging:
        staging.words_array = staging.words_array.view(CountedArray)


def lines_of_steps(
    num_running: int, output_tokens: tuple[int, int], num_steps: int, counted: Counted = counted_lines
) -> list[tuple[int, ExecuteStep]]:
    """Lines of each lap, from the tokens of one step to the launch of the next, and the step that is launched in it."""
    loop = EqualRequests(num_running=num_running, output_tokens=output_tokens, step_ns=1000, clock=StandingClock())
    if counted is counted_operations:
        watch_arrays(loop)
    loop.run(30)  # prompts, and what is done once
    found: list[tuple[int, ExecuteStep]] = []
    launch = loop._runner.launch
    with counted() as num_lines:
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


def test_operations_on_arrays_are_counted() -> None:
    array = np.zeros(5, dtype=np.int32).view(CountedArray)
    with counted_operations() as num_operations:
        array[2:3] = 1
        array += array
        assert array[2:].tolist() == [2, 0, 0]
        assert num_operations() == 3
    assert array.tolist() == [0, 0, 2, 0, 0]


@pytest.mark.parametrize("num_running", [FEW, MANY])
def test_a_step_takes_few_operations_on_arrays_by_what_changes_in_it(num_running: int) -> None:
    most: dict[str, int] = {}
    before: tuple[RequestId, ...] = ()
    for count, step in lines_of_steps(num_running, (20, 20 * num_running), 200, counted_operations):
        kind = "chunk" if max(step.num_tokens) > 1 else "same rows" if step.request_ids == before else "other rows"
        most[kind] = max(most.get(kind, 0), count)
        before = step.request_ids
    # Counted up and copied; a run of rows moved, or rows put behind; a line each of rows and samples put behind them.
    assert most["same rows"] <= SAME_ROWS
    assert most["other rows"] <= OTHER_ROWS
    assert most["chunk"] <= CHUNK
