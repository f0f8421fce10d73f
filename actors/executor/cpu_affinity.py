"""Which cores an executor's threads are bound to, and whether binding them would do more harm than good."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from ...kernels import thread_binding
from ...messages.errors import InvalidConfigError
from .cpu_topology import Cpu, cpu_quota, foreign_load, parse_cpu_list, read_cpus

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is bound
    fcntl = None  # type: ignore[assignment]

log = structlog.get_logger()

_BUSY = 0.5  # processors: with so much of others' work on them, threads had better move out of its way


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided.

    Attributes:
        cpus: one for each thread, the stepping thread first; empty: threads run where the system puts them.
        num_threads: threads to compute with.
        reason: for the log.
    """

    cpus: tuple[int, ...]
    num_threads: int
    reason: str


def choose_cores(
    asked: str,
    available: tuple[Cpu, ...],
    *,
    taken: set[int],
    quota: float,
    busy: float,
    num_threads: int | None,
    ranks: int = 1,
    place: tuple[int, int] = (0, 1),
) -> Choice:
    """Decide for one executor.

    Args:
        asked: `auto`, `off`, or a list of cores such as `0-3,8`.
        available: processors that the process may use.
        taken: those that other executors on this machine are bound to.
        quota: processors' worth of time granted.
        busy: processors that others keep busy.
        num_threads: asked for; None takes the physical cores of one NUMA node, or what the quota is worth.
        ranks: executors that share this machine and its quota evenly.
        place: which of how many executors this is that share the cores of a list: each takes as many, in turn.

    Raises:
        InvalidConfigError: `asked` names cores that this process cannot have, or not as many as all of them need.
    """
    if asked not in ("auto", "off"):
        return _as_asked(asked, available, num_threads, place)
    # One processor of each core, by node; the node with most of them first, then those that help it out.
    nodes: dict[int, dict[tuple[int, int], int]] = {}
    for cpu in available:
        if cpu.cpu not in taken:
            nodes.setdefault(cpu.node, {}).setdefault(cpu.core, cpu.cpu)
    ordered = sorted(nodes, key=lambda node: (-len(nodes[node]), node))
    cores_in_all = max(1, len({cpu.core for cpu in available}) // ranks)
    quota /= ranks
    granted = max(1, math.ceil(quota)) if math.isfinite(quota) else cores_in_all
    threads = num_threads or min(len(nodes[ordered[0]]) if ordered else cores_in_all, cores_in_all, granted)
    if asked == "off":
        return Choice((), num_threads or min(cores_in_all, granted), "off")
    if threads == 1:
        return Choice((), threads, "one thread")
    if quota < threads:
        return Choice((), threads, f"a quota of {quota:g} processors")
    if taken and sum(map(len, nodes.values())) < threads:
        return Choice((), threads, "other engines are bound to the cores")
    if busy >= _BUSY:
        return Choice((), threads, f"others keep {busy:.1f} processors busy")
    cpus = [cpu for node in ordered for cpu in nodes[node].values()][:threads]
    if len(cpus) < threads:
        return Choice((), threads, f"{threads} threads for {len(cpus)} cores")
    used = sorted({cpu.node for cpu in available if cpu.cpu in cpus})
    where = f"NUMA node {used[0]}" if len(used) == 1 else f"NUMA nodes {', '.join(map(str, used))}"
    return Choice(tuple(cpus), threads, f"a physical core for each thread, {where}")


def _as_asked(asked: str, available: tuple[Cpu, ...], num_threads: int | None, place: tuple[int, int]) -> Choice:
    try:
        cpus = parse_cpu_list(asked)
    except ValueError as error:
        raise InvalidConfigError(f"cpu_affinity: {error}; or auto, or off", field="cpu_affinity") from error
    absent = set(cpus) - {cpu.cpu for cpu in available}
    if absent:
        raise InvalidConfigError(
            f"cpu_affinity={asked}: this process may not use {', '.join(map(str, sorted(absent)))}; it may use "
            f"{', '.join(str(cpu.cpu) for cpu in available)}",
            field="cpu_affinity",
        )
    index, count = place
    threads = num_threads or max(1, len(cpus) // count)
    if threads * count != len(cpus):
        sharing = "" if count == 1 else f" in each of {count} executors that share them"
        remedy = "leave one of them out" if num_threads and count == 1 else f"name {threads * count}"
        raise InvalidConfigError(
            f"cpu_affinity={asked} names {len(cpus)} cores for num_threads={threads}{sharing}: {remedy}",
            field="cpu_affinity",
        )
    return Choice(cpus[index * threads : (index + 1) * threads], threads, "asked for")


class Claims:
    """Cores that executors on this machine are bound to, each told by a lock on a file that its owner holds open.

    A lock ends with its process, however that ends.

    Args:
        folder: shared by the executors of one user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        user = os.getuid() if hasattr(os, "getuid") else 0
        base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        self._folder = folder or Path(base) / f"octavo-cores-{user}"
        self._held: list[int] = []
        weakref.finalize(self, _close_all, self._held)

    def claim(self, cpu: int) -> bool:
        """Take a core; False if another executor has it."""
        if fcntl is None:
            return True
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            file = os.open(self._folder / f"core.{cpu}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return True  # no place to tell others: as if there were none
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return False
        self._held.append(file)
        return True

    def taken(self, cpus: tuple[Cpu, ...]) -> set[int]:
        """Those of `cpus` that other executors have."""
        found = set()
        for cpu in cpus:
            held = len(self._held)
            if not self.claim(cpu.cpu):
                found.add(cpu.cpu)
            while len(self._held) > held:
                os.close(self._held.pop())
        return found

    def release(self) -> None:
        """Give all of them back."""
        _close_all(self._held)


def _close_all(files: list[int]) -> None:
    while files:
        os.close(files.pop())


class CpuAffinity:
    """The threads of one executor: how many, and on which cores.

    Args:
        asked, num_threads, ranks, place: as for `choose_cores`.
        claims: how executors tell each other which cores they have.
    """

    def __init__(
        self,
        asked: str,
        num_threads: int | None,
        claims: Claims | None = None,
        *,
        ranks: int = 1,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self._claims = claims or Claims()
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        available = read_cpus(allowed)
        self._num_nodes = len({cpu.node for cpu in available})
        if not available:
            self.choice = Choice((), num_threads or torch.get_num_threads(), "this system does not bind threads")
            return
        # An environment variable that counts threads says what the user wants.
        told = os.environ.get("OMP_NUM_THREADS", "")
        wanted = num_threads or (int(told) if told.isdecimal() and int(told) > 0 and asked in ("auto", "off") else None)
        may_bind = asked == "auto" and wanted != 1
        choice = choose_cores(
            asked,
            available,
            taken=self._claims.taken(available) if may_bind else set(),
            quota=cpu_quota(),
            busy=foreign_load(available) if may_bind else 0.0,
            num_threads=wanted,
            ranks=ranks,
            place=place,
        )
        contested = [cpu for cpu in choice.cpus if not self._claims.claim(cpu)]
        if contested and asked == "auto":
            self._claims.release()  # another one was quicker
            choice = Choice((), choice.num_threads, "other engines are bound to the cores")
        elif contested:
            reason = f"asked for, though other engines are bound to {', '.join(map(str, contested))}"
            choice = Choice(choice.cpus, choice.num_threads, reason)
        self.choice = choice

    @contextlib.contextmanager
    def near_memory(self) -> Iterator[None]:
        """Within it this thread runs on the chosen cores: what it writes first lies in their node's memory."""
        if not self.choice.cpus or self._num_nodes == 1:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.choice.cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def apply(self, *, computes: bool = True) -> None:
        """Bind the calling thread, which will run the steps, and its workers; the event loop's thread stays free.

        Args:
            computes: it does so with workers, each on a core of its own; else it may run on any of the cores.
        """
        choice = self.choice
        torch.set_num_threads(choice.num_threads)
        if choice.cpus:
            try:
                if computes:
                    thread_binding.bind_team(choice.cpus)
                else:
                    os.sched_setaffinity(0, choice.cpus)
            except (OSError, RuntimeError) as error:
                self._claims.release()
                self.choice = choice = Choice((), choice.num_threads, str(error))
        bound = ",".join(map(str, choice.cpus)) or "not bound"
        if structlog.is_configured():  # otherwise it would be said on the standard output of an embedding program
            log.info("executor.threads", num_threads=choice.num_threads, cores=bound, reason=choice.reason)

    def release(self) -> None:
        """Let other executors have the cores."""
        self._claims.release()
