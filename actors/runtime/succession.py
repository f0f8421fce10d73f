"""Who supervises: the one who holds a lock. When it dies, the kernel hands the lock to one of those who wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

_NAME = "supervisor"


class Succession:
    """The lock in a directory of sockets.

    It needs no election and no heartbeat: `flock` is dropped with the last descriptor of a process that died, however
    it died, and exactly one of those who wait gets it.

    Args:
        run_dir: the directory.

    Raises:
        OSError: it is not there.
    """

    def __init__(self, run_dir: Path) -> None:
        self._fd = os.open(run_dir / _NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def take(self) -> None:
        """Be the first to hold the lock.

        Raises:
            BlockingIOError: somebody holds it.
        """
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def await_turn(self, loop: asyncio.AbstractEventLoop, on_turn: Callable[[], None]) -> None:
        """Call `on_turn` on the loop once everybody who held the lock before is dead; from then on this process does.

        A thread waits, which does not keep the process from ending.
        """

        def wait() -> None:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            with contextlib.suppress(RuntimeError):  # the loop is closed: this process is about to end, too
                loop.call_soon_threadsafe(on_turn)

        threading.Thread(target=wait, daemon=True, name="succession").start()

    def release(self) -> None:
        """Let the next one have it."""
        os.close(self._fd)
