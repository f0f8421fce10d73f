"""CUDA graphs of steps of some sizes: hundreds of launches that cost the host one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from .mixed_sizes import MixedSize


class Graphs:
    """Decode steps of some sizes, and steps with chunks of prompts; a step of fewer rows or tokens is padded.

    On a CPU a size is a plain call of the same function over the same tensors.

    Args:
        decode: computes a decode step of so many rows; touches tensors at the same addresses each time.
        sizes: numbers of rows; empty for no graphs.
        device: where the steps are computed.
        mixed: the same of a step with chunks.
        mixed_sizes: of those that are captured.
    """

    def __init__(
        self,
        decode: Callable[[int], None],
        sizes: Sequence[int],
        device: torch.device,
        *,
        mixed: Callable[[MixedSize], None] | None = None,
        mixed_sizes: Iterable[MixedSize] = (),
    ) -> None:
        self._sizes = sorted(set(sizes))
        self._runs: dict[int | MixedSize, Callable[[], None]] = {size: partial(decode, size) for size in self._sizes}
        if mixed is not None:
            self._runs |= {size: partial(mixed, size) for size in mixed_sizes}
        self._device = device
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
        """
        pool = None
        for size in sorted(self._runs, key=_num_tokens, reverse=True):
            work = self._runs[size]
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                graph = torch.cuda.CUDAGraph()
                # Of this thread alone: others may use CUDA meanwhile (NCCL's watchdog asks for its events).
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    work()
                pool = pool or graph.pool()
                graph.replay()
                self._runs[size] = graph.replay
            self.num_captured += 1

    def run(self, size: int | MixedSize) -> None:
        """Compute a step of one of the sizes; one that is not captured, launch by launch."""
        self._runs[size]()

    def watch(self, wrap: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """Let every size be computed as `wrap` has it from now on, for measurements."""
        self._runs = {size: wrap(run) for size, run in self._runs.items()}


def _num_tokens(size: int | MixedSize) -> int:
    return size.num_tokens if isinstance(size, MixedSize) else size
