"""Many seeds, one after another or on several processes; the first that fails is shrunk and told of."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor

import msgspec

from ..guard import no_real_world
from .scenario import Scenario, draw_scenario
from .shrink import describe_scenario, shrink
from .world import RunResult, run_scenario

CHUNK = 50
"""Seeds that a process runs before it reports."""

NUM_LAST_EVENTS = 50

Progress = Callable[[int], None]
"""Called with the number of seeds done so far."""


class Failure(msgspec.Struct, frozen=True):
    """A seed that violates an invariant.

    Attributes:
        kind, detail: what is violated.
        scenario: of the seed.
        shrunk: a smaller scenario that violates the same.
        shrunk_detail, events, waits: what was seen there, the last events, and who waited for whom.
    """

    seed: int
    kind: str
    detail: str
    scenario: Scenario
    shrunk: Scenario
    shrunk_detail: str
    events: tuple[str, ...]
    waits: tuple[str, ...]

    @property
    def command(self) -> str:
        """What runs it again, anywhere."""
        return f"octavo sim fuzz --seeds 1 --seed {self.seed}"

    def text(self) -> str:
        """The report for a person."""
        before, after = self.scenario, self.shrunk
        lines = [
            f"seed {self.seed} violates: {self.kind}",
            f"  {self.detail}",
            f"shrunk from {len(before.clients)} clients and {len(before.faults)} faults "
            f"to {len(after.clients)} and {len(after.faults)}:",
            *(f"  {line}" for line in describe_scenario(after)),
            f"there: {self.shrunk_detail or self.kind}",
        ]
        if self.waits:
            lines += ["who waits for whom:", *(f"  {line}" for line in self.waits)]
        lines += [f"last {len(self.events)} events:", *(f"  {line}" for line in self.events)]
        lines.append(f"run it again: {self.command}")
        return "\n".join(lines)


class FuzzReport(msgspec.Struct, frozen=True):
    """What a range of seeds has shown; the same for any number of processes.

    Attributes:
        first_seed, num_seeds: the seeds that were run, up to and including the first that failed.
        num_events: entries of the agenda, over all of them.
        hash: over the hashes of all runs, in the order of seeds.
        failure: the first seed that failed, if one did.
    """

    first_seed: int
    num_seeds: int
    num_events: int
    hash: str
    failure: Failure | None = None

    def text(self) -> str:
        """The report for a person."""
        lines = [
            f"{self.num_seeds} seeds from {self.first_seed}, {self.num_events} events, hash {self.hash}",
            "no invariant was violated" if self.failure is None else self.failure.text(),
        ]
        return "\n".join(lines)


def run_seed(seed: int, max_recorded: int = 0) -> RunResult:
    """Run the scenario of one seed."""
    return run_scenario(draw_scenario(seed), max_recorded)


def run_seeds(first_seed: int, num_seeds: int) -> list[RunResult]:
    """Run seeds one after another, up to the first that fails; nothing of the real world is within reach."""
    results = []
    # Runs leave cycles behind; collecting them now and then costs less than looking for them all the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with no_real_world():
            for seed in range(first_seed, first_seed + num_seeds):
                results.append(run_seed(seed))
                if results[-1].kind:
                    break
    finally:
        if was_enabled:
            gc.enable()
    return results


def fuzz(num_seeds: int, first_seed: int = 0, jobs: int = 1, progress: Progress | None = None) -> FuzzReport:
    """Run seeds until one fails or all are done.

    Args:
        num_seeds, first_seed: which; >= 1 and >= 0.
        jobs: processes to use, >= 1; changes nothing but the time it takes.
        progress: told now and then how many are done.

    Raises:
        ValueError: a number out of range.
    """
    if num_seeds < 1 or first_seed < 0 or jobs < 1:
        raise ValueError(f"{num_seeds=} and {jobs=} must be at least 1, {first_seed=} at least 0")
    chunks = [
        (begin, min(CHUNK, first_seed + num_seeds - begin))
        for begin in range(first_seed, first_seed + num_seeds, CHUNK)
    ]
    digest = hashlib.sha256()
    num_done = num_events = 0
    failed_seed: int | None = None
    runs = _run_here(chunks) if jobs == 1 or len(chunks) == 1 else _run_on_processes(chunks, jobs)
    for results in runs:
        for result in results:
            digest.update(result.hash.encode())
            num_events += result.num_events
            num_done += 1
            if result.kind:
                failed_seed = first_seed + num_done - 1
        if progress is not None:
            progress(num_done)
        if failed_seed is not None:
            break
    runs.close()  # its processes are gone before anything is simulated here: no thread may run beside a simulation
    failure = None if failed_seed is None else explain(failed_seed)
    return FuzzReport(first_seed, num_done, num_events, digest.hexdigest(), failure)


def _run_here(chunks: list[tuple[int, int]]) -> Generator[list[RunResult], None, None]:
    for chunk in chunks:
        yield run_seeds(*chunk)


def _run_on_processes(chunks: list[tuple[int, int]], jobs: int) -> Generator[list[RunResult], None, None]:
    """Results in the order of chunks; a few chunks ahead of who reads them, so that a failure ends it soon."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(chunks)), mp_context=context) as pool:
        waiting: deque[Future[list[RunResult]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(run_seeds, *chunk))
                if len(waiting) > 4 * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def explain(seed: int) -> Failure:
    """Shrink the scenario of a seed that fails, and tell what happens there."""
    scenario = draw_scenario(seed)
    with no_real_world():
        first = run_scenario(scenario)
        assert first.kind, f"seed {seed} does not fail"

        def fails(candidate: Scenario) -> bool:
            return run_scenario(candidate).kind == first.kind

        shrunk = shrink(scenario, fails)
        last = run_scenario(shrunk, NUM_LAST_EVENTS)
    return Failure(seed, first.kind, first.detail, scenario, shrunk, last.detail, last.events, last.waits)
