"""Octavo's fake GPU, `octavo.actors.executor.gpu.fake_cuda`: notes what is made and launched on it, and checks it."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

from triton import knobs

from octavo.actors.executor.gpu import fake_cuda as fake
from octavo.actors.executor.gpu.fake_cuda import DEVICE, GpuFacts, KernelVariant, Transfers

__all__ = ["DEVICE", "Kernels", "fake_cuda"]

MAX_SHARED_BYTES = 227 * 1024  # that one thread block of an H100 or H200 can have


class Kernels:
    """What Triton was asked for.

    Attributes:
        made: names of kernels, one for each variant that would have been compiled.
        captured: of those, the ones that were made while a graph was captured, which a real one forbids.
        num_launches: of any of them.
        launched: the same by name.
        num_hits: variants that were compiled indeed, and found in Triton's cache on disk.
        waits: what made the host and the GPU wait for each other while a graph was captured, or within `no_waits`.
        races: pinned memory that was written while a copy of it was under way.
    """

    def __init__(self, *, compiles: bool) -> None:
        self._compiles = compiles
        self.made: list[str] = []
        self.captured: list[str] = []
        self.num_launches = 0
        self.launched: Counter[str] = Counter()
        self.num_hits = 0
        self.waits: list[str] = []
        self.races: list[str] = []
        self._is_capturing = self._may_not_wait = False
        knobs.compilation.listener = self._on_compiled

    def _on_compiled(self, *, cache_hit: bool, **_: Any) -> None:
        self.num_hits += cache_hit

    def make(self, variant: KernelVariant) -> None:
        options = variant.options
        self.made.append(
            f"{variant.name} {variant.signature} {variant.constexprs} {options.num_warps} {options.num_stages}"
        )
        if self._is_capturing:
            self.captured.append(variant.name)
        if self._compiles:
            shared = variant.compile().metadata.shared
            assert shared <= MAX_SHARED_BYTES, f"{self.made[-1]} takes {shared} bytes of shared memory"

    def launch(self, name: str, grid: tuple[int, int, int]) -> None:
        self.num_launches += 1
        self.launched[name] += 1
        x, y, z = grid
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise ValueError(f"{name} cannot be launched on a grid of {x} x {y} x {z}")

    @contextlib.contextmanager
    def capture(self, _graph: Any, **_options: Any) -> Iterator[None]:
        self._is_capturing = True
        with self.no_waits():
            yield
        self._is_capturing = False

    @contextlib.contextmanager
    def no_waits(self) -> Iterator[None]:
        before, self._may_not_wait = self._may_not_wait, True
        yield
        self._may_not_wait = before

    def wait(self, what: str) -> None:
        if self._may_not_wait:
            self.waits.append(what)


@contextlib.contextmanager
def fake_cuda(*, compiles: bool = False) -> Iterator[Kernels]:
    """Be on a machine with an H200; not to be undone, so that it is for a process of its own.

    Args:
        compiles: for sm_90 indeed, and check the shared memory; takes seconds a kernel.
    """
    kernels = Kernels(compiles=compiles)
    with fake.fake_cuda(
        GpuFacts(),
        on_variant=kernels.make,
        on_launch=kernels.launch,
        capture=kernels.capture,
        transfers=Transfers(kernels.wait, kernels.races.append),
    ):
        yield kernels
