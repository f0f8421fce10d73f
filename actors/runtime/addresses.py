"""Where the processes of one engine listen: a name and an incarnation say it, so nobody has to be told."""

from __future__ import annotations

EDGE = "edge 0"
"""The process that supervises the others; it is never replaced."""

EDGE_INCARNATION = 1

ENGINE = "engine"
"""Role of the engine processes: their names begin with it."""


def endpoint_of(run_dir: str, name: str, incarnation: int) -> str:
    """The `ipc://` endpoint of one start of a process; no two starts share one."""
    return f"ipc://{run_dir}/{name.replace(' ', '-')}.{incarnation}"
