"""What the threads of a process were at: computing, waiting for a processor, or waiting in the kernel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, NamedTuple

_MAX_BYTES: Final = 512
_RUNNABLE, _UNINTERRUPTIBLE = "R", "D"


class ThreadTimes(NamedTuple):
    """One thread, as of a look.

    Attributes:
        state: `R` runs or could run, `D` waits in the kernel (for a disk, a page, a driver), others as in proc(5).
        ran_ns: on a processor so far.
        delayed_ns: ready to run, before it was let run. What it waits for now is added when it runs.
    """

    state: str
    ran_ns: int
    delayed_ns: int


def read_threads(pid: int) -> dict[int, ThreadTimes]:
    """Times of a process's threads, by thread id; empty where the system does not say, or the process is gone.

    Source: proc(5), `/proc/pid/task/tid/stat`; Documentation/scheduler/sched-stats.rst, `/proc/<pid>/schedstat`.
    """
    try:
        tids = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208  # a fifth of the time, and a busy host has none
    except OSError:
        return {}
    threads = {}
    for tid in tids:
        folder = f"/proc/{pid}/task/{tid}/"
        try:
            stat, times = _read(folder + "stat"), _read(folder + "schedstat").split()
        except OSError:
            continue  # this thread has ended
        # The second field is a name in brackets, in which there may be brackets and blanks.
        state = stat[stat.rfind(b")") + 2 :][:1].decode("ascii", "replace")
        if len(times) >= 2:
            threads[int(tid)] = ThreadTimes(state, int(times[0]), int(times[1]))
    return threads


class Spent(NamedTuple):
    """What a process was at between two looks, by its busiest and by its most hindered thread.

    Attributes:
        ran_ns: on a processor.
        hindered_ns: kept from running by others: no processor, or no answer of the kernel.
    """

    ran_ns: int
    hindered_ns: int


def spent_between(before: Mapping[int, ThreadTimes], after: Mapping[int, ThreadTimes], elapsed_ns: int) -> Spent:
    """Compare two looks at a process.

    One thread that is kept from running keeps those from running who wait for it, for a lock such as the interpreter's
    or at a barrier; so it is not the sum over threads that counts, nor their mean.

    Args:
        before, after: the two looks; threads that are not in both are left out.
        elapsed_ns: from one to the other.
    """
    ran_ns = hindered_ns = 0
    for tid, now in after.items():
        if (then := before.get(tid)) is None:
            continue
        ran = min(now.ran_ns - then.ran_ns, elapsed_ns)
        hindered = now.delayed_ns - then.delayed_ns
        if now.state == then.state and now.state in (_RUNNABLE, _UNINTERRUPTIBLE):
            hindered = elapsed_ns - ran  # of which the system may not have taken account yet
        ran_ns = max(ran_ns, ran)
        hindered_ns = max(hindered_ns, min(hindered, elapsed_ns))
    return Spent(ran_ns, hindered_ns)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _MAX_BYTES)
    finally:
        os.close(fd)
