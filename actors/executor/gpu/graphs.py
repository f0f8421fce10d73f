"""CUDA graphs of steps of some sizes: hundreds of launches that cost the host one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import structlog
import torch

from .mixed_sizes import MixedSize

log = structlog.get_logger("octavo.executor")


class Graphs:
    """Decode steps of some sizes, and steps with chunks of prompts; a step of fewer rows or tokens is padded.

    On a CPU a size is a plain call of the same function over the same tensors.

    Args:
        decode: computes a decode step of so many rows; touches tensors at the same addresses each time.
        sizes: numbers of rows; empty for no graphs.
        device: where the steps are computed.
        mixed: the same of a step with chunks.
        mixed_sizes: of those that are captured.
        must_fit: for a group, whose members capture the same or nothing at all.
    """

    def __init__(
        self,
        decode: Callable[[int], None],
        sizes: Sequence[int],
        device: torch.device,
        *,
        mixed: Callable[[MixedSize], None] | None = None,
        mixed_sizes: Iterable[MixedSize] = (),
        must_fit: bool = False,
    ) -> None:
        self._sizes = sorted(set(sizes))
        self._runs: dict[int | MixedSize, Callable[[], None]] = {size: partial(decode, size) for size in self._sizes}
        if mixed is not None:
            self._runs |= {size: partial(mixed, size) for size in mixed_sizes}
        self._device = device
        self._must_fit = must_fit
        self.num_captured = 0

    @property
    def sizes(self) -> Sequence[int]:
        """Of decode steps."""
        return self._sizes

    def size_for(self, num_rows: int) -> int | None:
        """The smallest size that holds so many rows of a decode step; None if none does."""
        index = bisect_left(self._sizes, num_rows)
        return self._sizes[index] if index < len(self._sizes) else None

    def capture(self) -> None:
        """Capture every size, the largest first: the smaller ones then find room in the memory that it needs.

        Each runs once before, so that no kernel is compiled and no library begins its work inside a capture. What was
        loaded last must be a step without rows. And each is replayed once, as its first replay is a slow one: it brings
        the graph to the device.

        A size that there is no memory for stays without a graph, unless it must fit.

        Raises:
            OutOfMemoryError: torch's, of a size that must fit.
        """
        first: torch.cuda.CUDAGraph | None = None
        left_out: list[int | MixedSize] = []
        for size in sorted(self._runs, key=_num_tokens, reverse=True):
            work = self._runs[size]
            if self._device.type == "cuda":
                try:
                    graph = self._captured(work, first)
                except RuntimeError as error:
                    if self._must_fit or not _is_for_memory(error):
                        raise
                    left_out.append(size)
                    continue
                first = first or graph
                self._runs[size] = graph.replay
            else:
                work()
            self.num_captured += 1
        if left_out:
            log.warning(
                "executor.graphs", left_out=len(left_out), captured=self.num_captured, why="no memory is left for them"
            )

    def _captured(self, work: Callable[[], None], first: torch.cuda.CUDAGraph | None) -> torch.cuda.CUDAGraph:
        """A graph of what `work` launches, in the memory of the first one."""
        work()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: others may use CUDA meanwhile (NCCL's watchdog asks for its events).
            pool = first.pool() if first else None
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
        except BaseException:
            # A capture that cannot even be ended would leave its stream as the current one.
            torch.cuda.set_stream(torch.cuda.default_stream(self._device))
            raise
        graph.replay()
        return graph

    def run(self, size: int | MixedSize) -> None:
        """Compute a step of one of the sizes; one that is not captured, launch by launch."""
        self._runs[size]()

    def watch(self, wrap: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """Let every size be computed as `wrap` has it from now on, for measurements."""
        self._runs = {size: wrap(run) for size, run in self._runs.items()}


def _num_tokens(size: int | MixedSize) -> int:
    return size.num_tokens if isinstance(size, MixedSize) else size


def _is_for_memory(error: RuntimeError) -> bool:
    """Whether there was no memory; a capture that is broken off so may end with another error."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error.__context__, torch.OutOfMemoryError)
