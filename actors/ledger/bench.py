"""What keeping the ledger costs: `python -m octavo.actors.ledger.bench`."""

from __future__ import annotations

import time
from array import array

from ...messages.ids import Epoch, RequestId, StepId
from ...messages.request import SubmitRequest
from ...messages.sampling import SamplingParams
from ...messages.step import StepExecuted
from ...messages.system import EngineLost
from .core import LedgerCore

NUM_ROWS = 256
NUM_STEPS = 1000
PROMPT_TOKENS = 2000


def _filled() -> tuple[LedgerCore, tuple[RequestId, ...]]:
    ledger = LedgerCore()
    ids = tuple(RequestId(10_000 + i) for i in range(NUM_ROWS))
    prompt = array("i", range(PROMPT_TOKENS)).tobytes()
    for request_id in ids:
        ledger.handle(SubmitRequest(request_id, prompt, SamplingParams(max_tokens=100_000)), 0)
    return ledger, ids


def microseconds_per_step(num_steps: int = NUM_STEPS) -> float:
    """Median CPU time of one step of `NUM_ROWS` rows, us."""
    ledger, ids = _filled()
    times = []
    for i in range(num_steps):
        step = StepExecuted(Epoch(0), StepId(i), ids, tuple(1000 + i + row for row in range(NUM_ROWS)))
        start = time.thread_time_ns()
        ledger.handle(step, 0)
        times.append(time.thread_time_ns() - start)
    return sorted(times)[num_steps // 2] / 1000


def microseconds_to_resubmit(num_steps: int = NUM_STEPS) -> float:
    """CPU time in which all requests are given to a new engine, after so many steps, us."""
    ledger, ids = _filled()
    for i in range(num_steps):
        ledger.handle(StepExecuted(Epoch(0), StepId(i), ids, ids), 0)
    start = time.thread_time_ns()
    again = ledger.handle(EngineLost(Epoch(1), "bench"), 0)
    elapsed = time.thread_time_ns() - start
    assert len(again) == NUM_ROWS
    return elapsed / 1000


def main() -> None:
    """Print a line for each."""
    print(f"a step of {NUM_ROWS} rows               {microseconds_per_step():7.1f} us")
    print(f"resubmitting {NUM_ROWS} live requests   {microseconds_to_resubmit():7.1f} us")


if __name__ == "__main__":
    main()
