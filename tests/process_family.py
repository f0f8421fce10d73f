"""Processes by their title, among the descendants of one; they may come and go while somebody looks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import psutil


def title(process: psutil.Process) -> str:
    """What a process calls itself; empty if it is dead, buried or not."""
    try:
        return process.cmdline()[0] if process.status() != psutil.STATUS_ZOMBIE else ""
    except (psutil.NoSuchProcess, IndexError):
        return ""


def named(name: str, root: int | None = None) -> list[psutil.Process]:
    """The living descendants of a process (of this one by default) with a title."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(root).children(recursive=True)
        return [process for process in family if title(process) == f"octavo: {name}"]
    return []


def descendants(but: Sequence[psutil.Process] = ()) -> list[psutil.Process]:
    """Of this process, the dead and unburied among them, without some: those that other tests left it, such as the
    tracker of resources that `multiprocessing` keeps."""
    return [process for process in psutil.Process().children(recursive=True) if process not in but]


async def until(condition: Callable[[], bool], every_s: float = 0.01, *, timeout_s: float | None = None) -> None:
    """Return once a condition holds; whoever gives no time bounds it.

    Args:
        every_s: between two looks; 0 is a turn of the event loop, where nothing else is waited for.
    """
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(every_s)


async def living(name: str, root: int | None = None, *, other_than: int = 0) -> psutil.Process:
    """The descendant with a title, once there is one and it is not the one with the pid `other_than`.

    A stream's last token may be here long before its executor's successor is: all of them may have been on their way
    when it was killed. So whoever wants to see the successor waits for it.
    """
    found: list[psutil.Process] = []

    def is_there() -> bool:
        found[:] = [process for process in named(name, root) if process.pid != other_than]
        return bool(found)

    await until(is_there, 0.05)  # a look at every process of the machine takes a while
    return found[0]
