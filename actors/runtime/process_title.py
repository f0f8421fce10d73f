"""What a process is called in `ps`, `top` and a crash report."""

from __future__ import annotations

import setproctitle

PREFIX = "octavo: "


def set_title(title: str) -> None:
    """Show this process as `octavo: <title>`."""
    setproctitle.setproctitle(PREFIX + title)
