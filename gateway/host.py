"""What this host lends to this process."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Processor cores that this process may run on: a container or `taskset` may grant fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
