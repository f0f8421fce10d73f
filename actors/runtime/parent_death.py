"""A process that does not outlive its parent, so that no crash leaves an orphan with the memory of a model."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.25


def die_with_parent(parent_pid: int) -> None:
    """Have this process killed when its parent dies; if that has happened already, end it now.

    On Linux the kernel sends SIGKILL, which ends even a stopped process. It is bound to the parent's *thread* that
    started this process, which therefore has to live as long as the parent does. Elsewhere a thread looks for a changed
    parent.

    Args:
        parent_pid: who is believed to be the parent.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"prctl(PR_SET_PDEATHSIG): {os.strerror(errno)}")
    else:
        threading.Thread(target=_watch, args=(parent_pid,), daemon=True, name="parent-watch").start()
    # The parent may have died between the start of this process and the call above: no signal comes any more.
    if os.getppid() != parent_pid:
        os._exit(1)


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    os._exit(1)
