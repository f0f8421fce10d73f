"""The threads of this process as the system counts them."""

from __future__ import annotations

import time
from pathlib import Path

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
