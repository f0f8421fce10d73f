"""What a process is called in `ps`, `top` and a crash report."""

from __future__ import annotations

from pathlib import Path

import setproctitle

PREFIX = "octavo: "


def set_title(title: str) -> str:
    """Show this process as `octavo: <title>`; returns what it was shown as, for `restore_title`."""
    before = str(setproctitle.getproctitle())
    setproctitle.setproctitle(PREFIX + title)
    return before


def restore_title(before: str) -> None:
    """Show this process as before a `set_title`: a program that ran an engine and goes on is none."""
    setproctitle.setproctitle(before)


def has_title(pid: int) -> bool:
    """Whether a process has been named by `set_title`; False where the system does not say."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(PREFIX.encode())
    except OSError:
        return False
