"""The threads that share an operation's work, each bound to a core of its own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch

from . import cpu_build
from .cpu_build import CODE

_PAUSE_SOFT = 1  # omp_pause_soft: settings stay (OpenMP 5.0, section 3.2.44)


def bind_team(cpus: Sequence[int]) -> None:
    """Bind the calling thread and the workers that it computes with, one to each of `cpus`, for good.

    OpenMP keeps a team of workers for each thread that computes, and torch and the C kernels share it: so this is said
    on the thread that will run the steps, and touches no other thread of the process.

    Raises:
        OSError: a core that is not there or not allowed.
        RuntimeError: there is no C library, or its team is smaller: it was built without threads, or OpenMP was told to
            make do with fewer (OMP_THREAD_LIMIT). Nothing is bound then.
    """
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("threads are bound by the C kernels, and there are none")
    torch.set_num_threads(len(cpus))
    error = kernels.octavo_bind_team((ctypes.c_int32 * len(cpus))(*cpus), len(cpus))
    if error < 0:
        raise RuntimeError(
            f"the C kernels compute with fewer than {len(cpus)} threads: built without OpenMP, or limited"
        )
    if error:
        raise OSError(error, f"{os.strerror(error)}: cannot bind threads to cores {', '.join(map(str, cpus))}")


def release_team() -> None:
    """End the workers that the calling thread computed with; it gets new ones when it next computes.

    For a thread that has loaded what another will run. OpenMP counts the workers of all threads, and where they are
    more than the cores, it lets each sleep as soon as it has nothing to do: with two threads on two cores a decode step
    of Qwen3-0.6B's shape took 55 ms beside the idle workers of the thread that had loaded it, and 36 ms without them.
    Does nothing where OpenMP's library does not know how (libgomp from GCC 9 on does), or nothing was computed in C.
    """
    pause = getattr(cpu_build.loaded(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_PAUSE_SOFT)


_kernels = cpu_build.declared(
    octavo_bind_team=(CODE, ctypes.POINTER(ctypes.c_int32), CODE),
)
