"""The threads of this process as the system counts them, and work for several."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from octavo.kernels import cpu_build

_TASKS = Path("/proc/self/task")
_PATIENCE_S = 60.0

CAN_LOOK = _TASKS.exists()


def running_threads() -> set[int]:
    """Their numbers."""
    return {int(task.name) for task in _TASKS.iterdir()}


def wait_until_gone(threads: set[int]) -> None:
    """One that has ended is listed for a moment more. Returns after a minute at the latest."""
    deadline = time.monotonic() + _PATIENCE_S
    while threads & running_threads() and time.monotonic() < deadline:
        time.sleep(0.001)


def compute_with(num_threads: int) -> None:
    """Have this thread compute something with so many threads, which then wait for more. Needs the C kernels."""
    openmp = cpu_build.library()  # in which OpenMP's own functions are found, too
    before = torch.get_num_threads()  # torch says how many when it first asks on a thread
    openmp.omp_set_num_threads(num_threads)
    torch.ones(num_threads << 16).add_(1)
    openmp.omp_set_num_threads(before)
