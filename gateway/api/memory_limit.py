"""How near this server is to the memory at which the system kills one of its processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

FULL: Final = 0.95
"""Share of the limit from which on nothing more is let in: what is at work still grows a little."""

LOOK_EVERY_NS: Final = 250_000_000

_ROOT: Final = Path("/sys/fs/cgroup")


class MemoryLimit:
    """The control group that this process runs in (a container's, a service's), and those above it.

    What the page cache holds of files is not counted where the system would give it back first.

    Args:
        root: where control groups are mounted.
        membership: which groups this process is in.

    Source: Linux's cgroup-v2.rst and cgroup-v1/memory.rst; proc(5), `/proc/pid/cgroup`.
    """

    def __init__(self, root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> None:
        groups = [(folder, names) for folder, names in _groups(root, membership)]
        self._limited = [(folder, names, limit) for folder, names in groups if (limit := _limit(folder / names.limit))]

    @property
    def share(self) -> float:
        """How much of the tightest limit is used: 1.0 is all of it; 0.0 without a limit, or where nobody says."""
        return max((_used(folder, names) / limit for folder, names, limit in self._limited), default=0.0)


class MemoryWatch:
    """Whether there is room for more work, looked at now and then.

    Args:
        read_share: as of `MemoryLimit`.
    """

    def __init__(self, read_share: Callable[[], float]) -> None:
        self._read_share = read_share
        self._looked_ns = -LOOK_EVERY_NS
        self._share = 0.0

    def is_full(self, now_ns: int) -> bool:
        """Whether nothing more is to be let in."""
        if now_ns - self._looked_ns >= LOOK_EVERY_NS:
            self._looked_ns = now_ns
            self._share = self._read_share()
        return self._share >= FULL


class _Names(NamedTuple):
    """Files of a group."""

    limit: str
    used: str
    droppable: str  # a line of `memory.stat`


_V2: Final = _Names("memory.max", "memory.current", "inactive_file")
_V1: Final = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_NO_LIMIT: Final = 1 << 60
"""Version 1 says more than this where there is none."""


def _groups(root: Path, membership: Path) -> Iterator[tuple[Path, _Names]]:
    """The folder of this process's group and of each above it."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, _V2
        elif "memory" in controllers.split(","):
            top, names = root / "memory", _V1
        else:
            continue
        folder = top / path.lstrip("/")
        yield folder, names
        while folder != top and top in folder.parents:
            folder = folder.parent
            yield folder, names


def _limit(file: Path) -> int:
    """Bytes; 0 for none."""
    try:
        text = file.read_text().strip()
    except OSError:
        return 0
    limit = int(text) if text.isdigit() else 0
    return limit if limit < _NO_LIMIT else 0


def _used(folder: Path, names: _Names) -> int:
    """Bytes that are in use and cannot simply be dropped."""
    try:
        used = int((folder / names.used).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return 0
    droppable = [int(line.split()[1]) for line in stat.splitlines() if line.startswith(f"{names.droppable} ")]
    return max(0, used - sum(droppable))
