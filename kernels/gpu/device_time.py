"""How long the device computes, whatever the host takes to ask for it.

Between two events that are recorded on an idle device lies the host's time for the launch as well: for a call of 50
microseconds' work and 100 of Python, that alone is measured. So calls are replayed from a graph; and because even that
takes the host some microseconds to launch, the device is kept busy until everything has been enqueued.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

CALLS = 5  # in a graph: what lies between two of them counts, as it does in a step
_REPEATS = 15
_SLEEP_CYCLES = 1_000_000  # half a millisecond: a launch of a graph, or a call, takes the host a fifth of that
_LONGEST_SLEEP = 64 * _SLEEP_CYCLES


@dataclass(frozen=True, slots=True)
class Timed:
    """Microseconds of a call, the median; and `how` it was launched, if not from a graph."""

    us: float
    how: str = ""


def device_time(run: Callable[[], object], *, repeats: int = _REPEATS) -> Timed:
    """Time a call from a graph of some of it, or where it cannot be captured by itself, behind a device that is busy.

    The same inputs are read again and again: take ones that are larger than the cache, where that matters.
    """
    _warm_up(run)
    try:
        graph = _captured(run)
    except Exception as error:  # noqa: BLE001,RUF100 - whatever it is about a peer that no graph can hold
        torch.cuda.synchronize()
        why = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        return _timed(run, 1, repeats, f"eager: no graph ({why})")
    return _timed(graph.replay, CALLS, repeats, "")


def _warm_up(run: Callable[[], object]) -> None:
    """On another stream, as a capture asks for."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _timed(launch: Callable[[], object], num_calls: int, repeats: int, how: str) -> Timed:
    times: list[float] = []
    cycles = _SLEEP_CYCLES
    while len(times) < repeats:
        ms, is_the_device_s = _once(launch, cycles)
        if not is_the_device_s and cycles < _LONGEST_SLEEP:
            cycles *= 4
            times.clear()
            continue
        times.append(ms * 1e3 / num_calls)
    if not is_the_device_s:  # however long it was kept busy: a call that waits for it
        how = f"{how or 'graph'}; the host's time is in it"
    return Timed(statistics.median(times), how)


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
