"""A processor kept from one process by others, as an overcommitted host does it; no rights are needed for it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from process_family import living, until

from octavo.actors.runtime.thread_times import read_threads

_NUM_SPINNERS = 16
"""A thread that yields to all others gets 3 parts of time where each of them gets 1024: a slice in ten seconds."""

_SPIN = """
import os, signal, sys
from octavo.actors.runtime.parent_death import die_with_parent
die_with_parent(int(sys.argv[1]))
os.kill(os.getpid(), signal.SIGSTOP)
while True:
    pass
"""

HOOK = f"""
import os, subprocess, sys

# A desktop's scheduler shares processors between sessions first, so the spinners are to be of the executor's: they are
# started where that is, in the nursery, and go with it.
if any(part.endswith("runtime.nursery") for part in sys.orig_argv):
    sys.spinners = [
        subprocess.Popen([sys.executable, "-c", {_SPIN!r}, str(os.getpid())]) for _ in range({_NUM_SPINNERS})
    ]
"""
"""To be put where every Python looks at its start (`sitecustomize`)."""


class Starver:
    """Spinning processes that stand still until somebody is to be kept from running.

    Args:
        spinners: children of the nursery that `HOOK` had started.
    """

    def __init__(self, spinners: list[psutil.Process]) -> None:
        self._spinners = spinners
        self._core = max(os.sched_getaffinity(0))

    @classmethod
    async def of_nursery(cls) -> Starver:
        """Once all of them are there, and stand still."""
        nursery = await living("nursery")
        spinners: list[psutil.Process] = []

        def are_there() -> bool:
            spinners[:] = [child for child in nursery.children() if child.status() == psutil.STATUS_STOPPED]
            return len(spinners) == _NUM_SPINNERS

        await until(are_there)
        return cls(spinners)

    @contextlib.contextmanager
    def starve(self, victim: psutil.Process) -> Iterator[None]:
        """Keep a process from running, on a processor full of others; it has all of them back afterwards, if it lives.

        It goes on at the lowest priority where only the superuser may give another one back.
        """
        everywhere = os.sched_getaffinity(0)
        try:
            for spinner in self._spinners:
                os.sched_setaffinity(spinner.pid, {self._core})
                spinner.resume()
            _schedule(victim.pid, {self._core}, os.SCHED_IDLE)
            yield
        finally:
            for spinner in self._spinners:
                spinner.suspend()
            _schedule(victim.pid, everywhere, os.SCHED_OTHER)

    def close(self) -> None:
        for spinner in self._spinners:
            spinner.kill()


def ran_ns(victim: psutil.Process) -> int:
    """How long all of its threads together have had a processor."""
    return sum(thread.ran_ns for thread in read_threads(victim.pid).values())


def can_starve() -> bool:
    """Whether the system has a policy for those that yield to all others, and says who waits; and a processor more."""
    return sys.platform == "linux" and Path("/proc/self/schedstat").exists() and len(os.sched_getaffinity(0)) > 1


def _schedule(pid: int, cores: set[int], policy: int) -> None:
    tasks = Path(f"/proc/{pid}/task")
    for tid in sorted(int(task.name) for task in tasks.iterdir()) if tasks.is_dir() else []:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.sched_setaffinity(tid, cores)
            os.sched_setscheduler(tid, policy, os.sched_param(0))
