"""How long the device computes, whatever the host takes to ask for it.

Between two events that are recorded on an idle device lies the host's time for the launch as well: for a call of 50
microseconds' work and 100 of Python, that alone is measured. So calls are replayed from a graph; and because even that
takes the host some microseconds to launch, the device is kept busy until everything has been enqueued. What comes
before brings its clocks up, which fall while it has nothing to do.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CALLS = 5  # in a graph, at least: what lies between two of them counts, as it does in a step
_REPEATS = 21
_SLEEP_CYCLES = 1_000_000  # half a millisecond: a launch of a graph, or a call, takes the host a fifth of that
_LONGEST_SLEEP = 64 * _SLEEP_CYCLES
_WARM_MS = 10.0  # of the same work before any of it counts
_MOST_WARM = 200  # launches


@dataclass(frozen=True, slots=True)
class Timed:
    """Microseconds of a call.

    Attributes:
        us: the median.
        how: it was launched, if not from a graph.
        low_us, high_us: a tenth of the repeats took no longer, and a tenth longer; 0 where there were too few.
    """

    us: float
    how: str = ""
    low_us: float = 0.0
    high_us: float = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """As a benchmark's row has them."""
        return {"us": self.us, "low_us": self.low_us, "high_us": self.high_us}


def device_time(*runs: Callable[[], object], repeats: int = _REPEATS) -> Timed:
    """Time a call from a graph of some of it, or where it cannot be captured by itself, behind a device that is busy.

    Args:
        runs: do the same on different data and take turns. The more of it there is, the less does one of them find in
            the cache: several times what the cache holds, where that matters.
    """
    calls = [*runs] * -(-CALLS // len(runs))
    _warm_up(calls)
    try:
        graph = _captured(calls)
    except Exception as error:  # noqa: BLE001,RUF100 - whatever it is about a peer that no graph can hold
        torch.cuda.synchronize()
        why = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        return _timed(_next_of(runs), 1, repeats, f"eager: no graph ({why})")
    return _timed(graph.replay, len(calls), repeats, "")


def _warm_up(calls: list[Callable[[], object]]) -> None:
    """On another stream, as a capture asks for."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _next_of(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call of the first, then of the second, and round again."""
    turns = itertools.cycle(runs)

    def launch() -> object:
        return next(turns)()

    return launch


def _timed(launch: Callable[[], object], num_calls: int, repeats: int, how: str) -> Timed:
    times: list[float] = []
    cycles = _SLEEP_CYCLES
    first_ms, _ = _once(launch, cycles)
    for _ in range(min(_MOST_WARM, int(_WARM_MS / max(first_ms, 1e-3)))):
        launch()
    while len(times) < repeats:
        ms, is_the_device_s = _once(launch, cycles)
        if not is_the_device_s and cycles < _LONGEST_SLEEP:
            cycles *= 4
            times.clear()
            continue
        times.append(ms * 1e3 / num_calls)
    if not is_the_device_s:  # however long it was kept busy: a call that waits for it
        how = f"{how or 'graph'}; the host's time is in it"
    return _of(times, how)


def _of(times: list[float], how: str) -> Timed:
    """Of repeats, in microseconds."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [0.0]
    return Timed(statistics.median(times), how, tenths[0], tenths[-1])


def _once(launch: Callable[[], object], cycles: int) -> tuple[float, bool]:
    """Milliseconds, and whether all was enqueued before the device began: else it may have waited for the host."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # so too
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # and this
    begin.record()
    launch()
    end.record()
    is_the_device_s = not begin.query()
    end.synchronize()
    return begin.elapsed_time(end), is_the_device_s
