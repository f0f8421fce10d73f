"""What a server and its processes hold, and what has grown between two counts."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import time
from pathlib import Path
from typing import Final

import msgspec
import psutil

from .api.engine_protocol import EngineLike
from .api.server import RunningServer
from .chaos.processes import ServerProcesses, title_of

MAX_GROWTH: Final = 0.01
"""Of resident memory, after the warm-up."""

MIN_GROWTH_BYTES: Final = 2 * 1024 * 1024
"""Less is the allocator's, not ours."""

QUIET_S: Final = 30.0
_LOOK_EVERY_S: Final = 0.1
_M_ARENA_MAX: Final = -8  # malloc.h
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # it is counted, nothing is put there


class Holdings(msgspec.Struct, frozen=True, kw_only=True):
    """What this process and its children hold while nothing is going on.

    Attributes:
        num_live: sequences.
        kv_usage: share of KV blocks that sequences hold.
        num_streams: open responses.
        num_files, num_threads, rss_bytes: by process title; of this process as `edge`, without what is freed but kept.
        num_tasks: of this process's event loop.
        num_shared: mappings of shared memory.
        num_orphans: files of shared memory, of this user, that no process maps any more.
        pids: by process title.
    """

    num_live: int
    kv_usage: float
    num_streams: int
    num_files: dict[str, int]
    num_threads: dict[str, int]
    rss_bytes: dict[str, int]
    num_tasks: int
    num_shared: int
    pids: dict[str, int]
    num_orphans: int = 0


def compare(before: Holdings, after: Holdings) -> tuple[list[str], dict[str, float]]:
    """What grew, in words, and the growth of memory of each process."""
    leaks = []
    if after.num_live or after.kv_usage:
        leaks.append(f"{after.num_live} sequences and {100 * after.kv_usage:.2f} % of the KV blocks are held by nobody")
    if after.num_streams:
        leaks.append(f"{after.num_streams} responses are open")
    if after.num_tasks > before.num_tasks:
        leaks.append(f"{after.num_tasks} tasks, were {before.num_tasks}")
    if after.num_shared > before.num_shared:
        leaks.append(f"{after.num_shared} mappings of shared memory, were {before.num_shared}")
    if after.num_orphans > before.num_orphans:
        leaks.append(f"{after.num_orphans} files of shared memory belong to nobody, were {before.num_orphans}")
    for name, ours, theirs in (
        ("file descriptors", before.num_files, after.num_files),
        ("threads", before.num_threads, after.num_threads),
    ):
        for title, count in theirs.items():
            if count > ours.get(title, count):
                leaks.append(f"{title}: {count} {name}, were {ours[title]}")
    leaks += [f"{title} is gone" for title in before.rss_bytes if title not in after.rss_bytes]
    leaks += [f"{title} is there, and was not before" for title in after.rss_bytes if title not in before.rss_bytes]
    growth = {
        title: size / before.rss_bytes[title] - 1.0
        for title, size in after.rss_bytes.items()
        if title in before.rss_bytes
    }
    for title, share in growth.items():
        grown = after.rss_bytes[title] - before.rss_bytes[title]
        # A replacement has touched other pages than the one before it: that is no growth.
        is_same = before.pids.get(title) == after.pids.get(title)
        if is_same and share > MAX_GROWTH and grown > MIN_GROWTH_BYTES:
            leaks.append(f"{title}: memory grew by {100 * share:.1f} % ({grown / 2**20:.1f} MiB)")
    return sorted(leaks), growth


def replaced(before: Holdings, after: Holdings) -> list[str]:
    """Processes that are not the same ones any more, in words."""
    return [
        f"{title} was replaced, though nobody made it fail"
        for title, pid in before.pids.items()
        if after.pids.get(title, pid) != pid
    ]


def orphaned_shared_memory(folder: Path = _SHARED_MEMORY) -> set[Path]:
    """Files of shared memory that are this user's, and that none of the user's processes maps."""
    own: set[Path] = set()
    for path in _files(folder):
        with contextlib.suppress(FileNotFoundError):  # it has just gone
            if path.stat().st_uid == os.getuid():
                own.add(path)
    if own:  # rare: it takes a look at every process
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                own -= {Path(entry.path) for entry in process.memory_maps()}
    return own


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def keep_one_heap() -> None:
    """Have all threads share one heap; does nothing with another C library than glibc. Call it before they start.

    Of a thread's own heap, malloc gives back what lies between things that are held, and never its end: a large step
    on one thread would look like a leak for ever.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Let malloc return to the system what nobody holds; does nothing with another C library than glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


async def holdings_when_quiet(engine: EngineLike, server: RunningServer) -> Holdings:
    """Count, once what was cancelled is gone (blocks are free within a step, sockets a turn of the loop later)."""
    ends_s = time.monotonic() + QUIET_S
    before = _holdings(engine, server)
    while time.monotonic() < ends_s:
        await asyncio.sleep(_LOOK_EVERY_S)
        gc.collect()
        give_back_freed_memory()
        now = _holdings(engine, server)
        is_still = msgspec.structs.replace(now, rss_bytes={}) == msgspec.structs.replace(before, rss_bytes={})
        if is_still and engine.is_ready and not (now.num_live or now.num_streams or now.kv_usage):
            return now
        before = now
    return before


def _holdings(engine: EngineLike, server: RunningServer) -> Holdings:
    own = psutil.Process()
    family = {"edge": own}
    for actor in ("nursery", "engine", "executor"):
        family.update((title_of(process), process) for process in ServerProcesses(own).doing(actor))
    files: dict[str, int] = {}
    threads: dict[str, int] = {}
    rss: dict[str, int] = {}
    shared = 0
    for title, process in family.items():
        try:
            with process.oneshot():
                files[title] = process.num_fds()
                threads[title] = process.num_threads()
                rss[title] = process.memory_info().rss
                shared += sum(entry.path.startswith(str(_SHARED_MEMORY)) for entry in process.memory_maps())
        except psutil.Error:
            continue  # it has just gone
    stats = engine.stats()
    return Holdings(
        num_live=stats.num_live,
        kv_usage=stats.kv_cache_usage,
        num_streams=server.num_open_streams,
        num_files=files,
        num_threads=threads,
        rss_bytes=rss,
        num_tasks=len(asyncio.all_tasks()),
        num_shared=shared,
        pids={title: process.pid for title, process in family.items()},
        num_orphans=len(orphaned_shared_memory()),
    )
