"""Who supervises: the one who holds a lock. When it dies, the kernel hands the lock to one of those who wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from .pidfd import open_pidfd, signal_pidfd
from .process_state import is_stopped
from .process_title import has_title

_NAME = "supervisor"
_PID_BYTES = _GENERATION_BYTES = 20


class Succession:
    """The lock in a directory of sockets.

    It needs no election and no heartbeat: `flock` is dropped with the last descriptor of a process that died, however
    it died, and exactly one of those who wait gets it.

    Args:
        run_dir: the directory.

    Attributes:
        generation: how many held the lock before this process had its turn, whether or not anybody heard of them; -1
            until then.

    Raises:
        OSError: it is not there.
    """

    def __init__(self, run_dir: Path) -> None:
        self.generation = -1
        self._fd = os.open(run_dir / _NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def take(self) -> None:
        """Be the first to hold the lock.

        Raises:
            BlockingIOError: somebody holds it.
        """
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._sign()

    def await_turn(self, loop: asyncio.AbstractEventLoop, on_turn: Callable[[], None]) -> None:
        """Call `on_turn` on the loop once everybody who held the lock before is dead; from then on this process does.

        A thread waits, which does not keep the process from ending.
        """

        def wait() -> None:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._sign()
            with contextlib.suppress(RuntimeError):  # the loop is closed: this process is about to end, too
                loop.call_soon_threadsafe(on_turn)

        threading.Thread(target=wait, daemon=True, name="succession").start()

    @property
    def holder(self) -> int:
        """Pid of the process that got the lock last; 0 before anybody did."""
        return int(os.pread(self._fd, _PID_BYTES, 0) or b"0")

    def is_holder_stopped(self) -> bool:
        """Whether who holds the lock is stopped by a signal."""
        return is_stopped(self.holder)

    def end_holder(self) -> bool:
        """Kill who holds the lock, if it is stopped: then it never acts again, and the next one has its turn.

        Returns:
            Whether it was; else it has gone on, or is dead, or this system cannot tell for certain who it is.
        """
        pid = self.holder
        pidfd = open_pidfd(pid) if pid and pid != os.getpid() else -1
        if pidfd < 0:
            return False
        try:
            # The descriptor means one process for ever. It is the holder if the holder's pid is still the one that
            # stands there, and no stranger that was given the pid of a dead one.
            if self.holder != pid or not has_title(pid) or not is_stopped(pid):
                return False
            signal_pidfd(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        return True

    def _sign(self) -> None:
        last = os.pread(self._fd, _GENERATION_BYTES, _PID_BYTES)
        self.generation = int(last) + 1 if last else 0
        os.pwrite(self._fd, f"{os.getpid():<{_PID_BYTES}}{self.generation:<{_GENERATION_BYTES}}".encode(), 0)

    def release(self) -> None:
        """Let the next one have it."""
        os.close(self._fd)
