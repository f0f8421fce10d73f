"""Watches the processes of edges that another one had started: no parent here is told of their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from ...actors.runtime.addresses import mark_of
from ...actors.runtime.process_mark import MarkedProcess, find_marked

log = structlog.get_logger("octavo.edges")

MAX_HALT_NS = 300_000_000
"""As long as a supervisor lets a child of its own be stopped by a signal before it counts as hung."""


class _Watched(msgspec.Struct):
    incarnation: int
    process: MarkedProcess | None = None
    halted_ns: int = -1  # since when it has been stopped; -1: it is not


class EdgeWatch:
    """Notices at once that such an edge has ended, and ends one that is stopped and would stay so for ever.

    It knows them by the marks that they leave beside their sockets. Of one whose mark means nothing here (another
    system than Linux, no descriptors left) it knows nothing.

    Args:
        run_dir: of sockets and marks.
        on_exit: called on the loop with name and incarnation of one that has ended.
    """

    def __init__(self, run_dir: str, on_exit: Callable[[str, int], None]) -> None:
        self._run_dir = run_dir
        self._on_exit = on_exit
        self._watched: dict[str, _Watched] = {}

    def add(self, name: str, incarnation: int) -> None:
        """Watch an edge from the next look on."""
        self._watched[name] = _Watched(incarnation)

    def remove(self, name: str) -> None:
        """Watch an edge no longer."""
        watched = self._watched.pop(name, None)
        if watched is not None and watched.process is not None:
            asyncio.get_running_loop().remove_reader(watched.process.pidfd)
            watched.process.close()

    def close(self) -> None:
        """Watch none of them any longer."""
        for name in list(self._watched):
            self.remove(name)

    def kill(self, name: str, why: str) -> None:
        """End an edge, if it can be told for certain which process it is."""
        watched = self._watched.get(name)
        if watched is not None and watched.process is not None:
            log.warning("edge.killed", edge=name, incarnation=watched.incarnation, pid=watched.process.pid, why=why)
            watched.process.kill()

    def look(self, now_ns: int, *, stood_still: bool) -> None:
        """Look at each; `stood_still`: this process did, and knows of no time before."""
        for name, watched in list(self._watched.items()):
            if watched.process is None and not self._find(name, watched):
                continue
            assert watched.process is not None
            if stood_still or not watched.process.is_stopped():
                watched.halted_ns = -1
            elif watched.halted_ns < 0:
                watched.halted_ns = now_ns
            elif now_ns - watched.halted_ns >= MAX_HALT_NS:
                watched.halted_ns = -1  # it needs saying once
                self.kill(name, "it is stopped by a signal, and nobody else is left who would let it go on")

    def _find(self, name: str, watched: _Watched) -> bool:
        """Find the process of an edge; False if there is none, or it cannot be told."""
        try:
            process = find_marked(mark_of(self._run_dir, name, watched.incarnation))
        except ProcessLookupError:
            self._end(name)
            return False
        if process is None:
            return False
        watched.process = process
        asyncio.get_running_loop().add_reader(process.pidfd, self._end, name)
        return True

    def _end(self, name: str) -> None:
        incarnation = self._watched[name].incarnation
        self.remove(name)
        self._on_exit(name, incarnation)
