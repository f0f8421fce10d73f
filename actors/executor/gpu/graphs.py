"""CUDA graphs of decode steps: hundreds of launches that cost the host one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch


class Graphs:
    """Decode steps of some sizes; a step of fewer rows is padded to the next.

    On a CPU a size is a plain call of the same function over the same tensors.

    Args:
        decode: computes a decode step of so many rows; touches tensors at the same addresses each time.
        sizes: numbers of rows; empty for no graphs.
        device: where `decode` computes.
    """

    def __init__(self, decode: Callable[[int], None], sizes: Sequence[int], device: torch.device) -> None:
        self._decode = decode
        self._sizes = sorted(set(sizes))
        self._device = device
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.num_captured = 0

    @property
    def sizes(self) -> Sequence[int]:
        return self._sizes

    def size_for(self, num_rows: int) -> int | None:
        """The smallest size that holds so many rows; None if none does."""
        index = bisect_left(self._sizes, num_rows)
        return self._sizes[index] if index < len(self._sizes) else None

    def capture(self) -> None:
        """Capture every size, the largest first: the smaller ones then find room in the memory that it needs.

        Each runs once before, so that no kernel is compiled and no library begins its work inside a capture. What was
        loaded last must be a step without rows.
        """
        pool = None
        for size in reversed(self._sizes):
            self._decode(size)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                graph = torch.cuda.CUDAGraph()
                # Of this thread alone: others may use CUDA meanwhile (NCCL's watchdog asks for its events).
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self._decode(size)
                pool = pool or graph.pool()
                self._graphs[size] = graph
            self.num_captured += 1

    def run(self, size: int) -> None:
        """Compute a decode step of one of the sizes; one that is not captured, launch by launch."""
        graph = self._graphs.get(size)
        if graph is None:
            self._decode(size)
        else:
            graph.replay()
