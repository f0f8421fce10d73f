"""What the system says that a process is at."""

from __future__ import annotations

import os
from typing import Final

_STOPPED: Final = b"T"
_STAT_BYTES: Final = 512


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP, a terminal's Ctrl-Z); False where the system does not say.

    A process that is slow, swapped out or starved of its processor is not.

    Source: proc(5), `/proc/pid/stat`, third field.
    """
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        stat = os.read(fd, _STAT_BYTES)
    except OSError:
        return False  # it is gone
    finally:
        os.close(fd)
    # The second field is a name in brackets, in which there may be brackets and blanks.
    return stat[stat.rfind(b")") + 2 :][:1] == _STOPPED
