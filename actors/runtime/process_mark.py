"""A note that a process leaves of itself, by which others of its user find it, and never another that got its pid."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from .pidfd import open_pidfd, signal_pidfd
from .process_state import is_stopped, started_at


def write_mark(path: Path, pid: int = 0) -> None:
    """Note who a process is, this one by default; whoever reads it reads all of it.

    Raises:
        OSError: the directory is gone.
    """
    pid = pid or os.getpid()
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(f"{pid} {started_at(pid)}")
    unfinished.replace(path)


def find_marked(path: Path) -> MarkedProcess | None:
    """The process that left a mark; None: there is no mark, or this system cannot tell for certain who it was.

    Raises:
        ProcessLookupError: it is gone.
    """
    try:
        pid, start = map(int, path.read_text().split())
    except (OSError, ValueError):
        return None
    if not pid or not start:
        return None
    pidfd = open_pidfd(pid)
    # The descriptor means one process for ever: the right one, if it had the pid before and the right one has it now.
    if started_at(pid) != start:
        if pidfd >= 0:
            os.close(pidfd)
        raise ProcessLookupError(f"process {pid} is gone")
    return MarkedProcess(pid, pidfd) if pidfd >= 0 else None


class MarkedProcess:
    """One that was found by its mark. To be closed.

    Attributes:
        pid: its process id.
        pidfd: becomes readable when it ends.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd

    def is_stopped(self) -> bool:
        """Whether it is stopped by a signal; of one that has ended, nothing is known."""
        return is_stopped(self.pid)

    def kill(self) -> None:
        """End it; nothing if it has ended."""
        signal_pidfd(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Give the descriptor back."""
        with contextlib.suppress(OSError):
            os.close(self.pidfd)
