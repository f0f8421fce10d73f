"""Compiles variants of Triton kernels on all cores, into Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from .compile_locks import NO_LOCKS, CompileLocks
from .fake_cuda import KernelVariant, build_launcher

_SLOWEST = (
    "choose_kernel",
    "tile_kernel",
    "share_kernel",
    "bracket_kernel",
    "_up_kernel",
    "_down_kernel",
    "_codes_up_kernel",
    "_codes_down_kernel",
    "reduce_shares_kernel",
)
"""Are compiled first, so that none of them is left when the other processes are done."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a variant.

    Attributes:
        name: of its kernel.
        is_new: it was not in Triton's cache yet.
        has_launcher: the C function that launches it is there as well.
        failure: why it does not compile; empty if it does.
    """

    name: str
    is_new: bool
    has_launcher: bool
    failure: str = ""


def compile_variants(
    variants: list[KernelVariant],
    num_processes: int,
    *,
    begin_process: Callable[[], object] = lambda: None,
    locks: CompileLocks = NO_LOCKS,
) -> Iterator[Compiled]:
    """Compile them, side by side; what became of each, in no order that matters, as soon as it is known.

    The processes are forks of this one: what was imported and found out is theirs at once.

    Args:
        begin_process: called in each of them first.
        locks: of whoever compiles to the same cache at the same time. What one of those is at comes last, when it has
            most likely been compiled.
    """
    _VARIANTS[:] = sorted(variants, key=lambda variant: variant.name not in _SLOWEST)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        min(num_processes, len(variants)) or 1, mp_context=fork, initializer=begin_process
    ) as processes:
        elsewhere: list[int] = []
        for index, compiled in enumerate(processes.map(partial(_compile_unless, locks), range(len(variants)))):
            if compiled is None:
                elsewhere.append(index)
            else:
                yield compiled
        yield from processes.map(partial(_compile_after, locks), elsewhere)


_VARIANTS: list[KernelVariant] = []  # of this process and its forks, as kernels cannot be sent


def _compile_unless(locks: CompileLocks, index: int) -> Compiled | None:
    """As `_compile`; None where another process is at it."""
    with locks.held(_VARIANTS[index], waits=False) as is_ours:
        return _compile(index) if is_ours else None


def _compile_after(locks: CompileLocks, index: int) -> Compiled:
    """As `_compile`, once no other process is at it."""
    with locks.held(_VARIANTS[index], waits=True):
        return _compile(index)


def _compile(index: int) -> Compiled:
    from triton import knobs

    hits: list[bool] = []

    def on_compiled(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = on_compiled
    variant = _VARIANTS[index]
    try:
        compiled = variant.compile()
    except Exception as error:  # noqa: BLE001,RUF100 - of the compiler, about one kernel: who launches it will see it
        return Compiled(variant.name, False, False, f"{type(error).__name__}: {str(error)[:200]}")
    return Compiled(variant.name, hits == [False], build_launcher(compiled))
