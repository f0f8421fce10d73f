"""What the system says about its processors: cores, NUMA nodes, what this process may use, what others use."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cpu:
    """One logical processor.

    Attributes:
        cpu: its number.
        core: of the physical core, `(package, core)`; hyperthreads of one core share it.
        node: of its memory.
    """

    cpu: int
    core: tuple[int, int]
    node: int


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """`0-3,8` as the kernel writes it: 0, 1, 2, 3, 8.

    Raises:
        ValueError: it is not such a list.
    """
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise ValueError(f"{text!r} is not a list of cores such as 0-3,8")
        cpus.extend(range(int(first), int(last if dash else first) + 1))
    if len(set(cpus)) != len(cpus):
        raise ValueError(f"{text!r} names a core twice")
    return tuple(cpus)


def read_cpus(allowed: set[int], system: Path = Path("/sys/devices/system")) -> tuple[Cpu, ...]:
    """The processors that this process may use; where the system does not say, each is a core of node 0."""
    node_of: dict[int, int] = {}
    for folder in sorted((system / "node").glob("node[0-9]*")):
        text = _read(folder / "cpulist")
        if text:
            node_of.update(dict.fromkeys(parse_cpu_list(text), int(folder.name.removeprefix("node"))))
    cpus = []
    for cpu in sorted(allowed):
        topology = system / "cpu" / f"cpu{cpu}" / "topology"
        package, core = _read(topology / "physical_package_id"), _read(topology / "core_id")
        known = core.isdecimal() and package.lstrip("-").isdecimal()
        cpus.append(Cpu(cpu, (int(package), int(core)) if known else (-1, cpu), node_of.get(cpu, 0)))
    return tuple(cpus)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """Processors' worth of time that control groups grant this process; infinite where they set no bound."""
    quotas = [float("inf")]
    for line in _read(process).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        inside = Path(path.strip().lstrip("/"))
        if not controllers:  # version 2: each group above bounds those below
            for folder in (inside, *inside.parents):
                quota, _, period = _read(root / folder / "cpu.max").partition(" ")
                quotas.append(_share(quota, period))
        elif "cpu" in controllers.split(","):
            for group in (root / "cpu", root / controllers):
                # Inside a container its own group is often mounted as the root.
                for folder in (inside, *inside.parents):
                    quota = _read(group / folder / "cpu.cfs_quota_us")
                    quotas.append(_share(quota, _read(group / folder / "cpu.cfs_period_us")))
    return min(quotas)


def foreign_load(cpus: tuple[Cpu, ...], seconds: float = 0.05, stat: Path = Path("/proc/stat")) -> float:
    """How many of these processors others than this process keep busy, looked at for so many seconds."""
    before, own_before = _busy_ticks(cpus, stat), time.process_time()
    time.sleep(seconds)
    ticks, own = _busy_ticks(cpus, stat) - before, time.process_time() - own_before
    # A tick is 10 ms mostly: one of them, seen by chance, is no load.
    ticks_per_second = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    return max(0.0, (ticks - 1) / ticks_per_second - own) / seconds


def _busy_ticks(cpus: tuple[Cpu, ...], stat: Path) -> int:
    wanted = {f"cpu{cpu.cpu}" for cpu in cpus}
    busy = 0
    for line in _read(stat).splitlines():
        name, *fields = line.split()
        if name in wanted:
            ticks = [int(field) for field in fields[:8]]
            busy += sum(ticks) - ticks[3] - ticks[4]  # idle, waiting for I/O
    return busy


def _share(quota: str, period: str) -> float:
    if not quota.strip().isdecimal() or not period.strip().isdecimal() or int(period) == 0:
        return float("inf")  # "max", -1, or not there
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
