"""Descriptors of processes: they become readable when the process dies, and can never mean another process.

Source: pidfd_open(2), Linux 5.3.
"""

from __future__ import annotations

import contextlib
import os
import signal


def open_pidfd(pid: int) -> int:
    """A descriptor of process `pid`, or -1: not on this system, no such process, or no descriptors left."""
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return -1


def signal_pidfd(pidfd: int, signum: int) -> None:
    """Signal the process of a descriptor; nothing if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signum)
