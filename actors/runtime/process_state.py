"""What the system says that a process is at."""

from __future__ import annotations

import os
from typing import Final

_STOPPED: Final = b"T"
_STAT_BYTES: Final = 512
_START_FIELD: Final = 22
_FIRST_FIELD: Final = 3  # behind the name


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP, a terminal's Ctrl-Z); False where the system does not say.

    A process that is slow, swapped out or starved of its processor is not.

    Source: proc(5), `/proc/pid/stat`, third field.
    """
    return _stat(pid)[:1] == _STOPPED


def started_at(pid: int) -> int:
    """When a process was started, in clock ticks since the system was; 0 if it is gone, or the system does not say.

    With the pid it names a process that no other is, before or after.

    Source: proc(5), `/proc/pid/stat`, field 22.
    """
    fields = _stat(pid).split()
    return int(fields[_START_FIELD - _FIRST_FIELD]) if len(fields) > _START_FIELD - _FIRST_FIELD else 0


def _stat(pid: int) -> bytes:
    """What is said of a process behind its name; empty if nothing is."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        stat = os.read(fd, _STAT_BYTES)
    except OSError:
        return b""  # it is gone
    finally:
        os.close(fd)
    # The second field is a name in brackets, in which there may be brackets and blanks.
    return stat[stat.rfind(b")") + 2 :]
