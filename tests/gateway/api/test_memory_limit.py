"""F-50: the gateway lets nobody in before the system kills for lack of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.gateway.api.memory_limit import FULL, LOOK_EVERY_NS, MemoryLimit, MemoryWatch
from octavo.gateway.api.overload import AdmissionCore, OverloadLimits
from octavo.gateway.stats import EngineStats

IDLE = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__[:12], 0))
MIB = 1 << 20


def group(folder: Path, *, limit: str, used: int = 0, files: int = 0, version: int = 2) -> None:
    """Write what the system would say of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {files}\n{prefix}active_file 7\n")


def limit_of(root: Path, membership: str) -> MemoryLimit:
    (root / "membership").write_text(membership)
    return MemoryLimit(root, root / "membership")


@pytest.mark.parametrize(
    ("version", "membership", "top"),
    [(2, "0::/pod/engine\n", ""), (1, "9:cpu:/x\n4:memory:/pod/engine\n0::/\n", "memory")],
)
def test_f_50_the_tightest_limit_above_counts_and_files_that_can_be_dropped_do_not(
    tmp_path: Path, version: int, membership: str, top: str
) -> None:
    none = "max" if version == 2 else str((1 << 63) - 4096)
    group(tmp_path / top / "pod/engine", limit=none, used=900 * MIB, version=version)
    group(tmp_path / top / "pod", limit=str(1000 * MIB), used=950 * MIB, files=150 * MIB, version=version)
    limit = limit_of(tmp_path, membership)
    assert limit.share == pytest.approx(0.8)
    group(tmp_path / top / "pod", limit=str(1000 * MIB), used=990 * MIB, files=10 * MIB, version=version)
    assert limit.share == pytest.approx(0.98)


@pytest.mark.parametrize("membership", ["", "0::/\n", "0::/gone\n", "nonsense\n", "4:memory:/\n"])
def test_without_a_limit_or_a_word_about_it_there_is_room(tmp_path: Path, membership: str) -> None:
    assert limit_of(tmp_path, membership).share == 0.0
    assert MemoryLimit(tmp_path, tmp_path / "not there").share == 0.0


def test_this_machine_says_something_that_makes_sense() -> None:
    assert 0.0 <= MemoryLimit().share < 2.0


def test_f_50_near_its_limit_the_gateway_refuses_and_says_when_and_lets_in_again_once_there_is_room() -> None:
    share = 0.5
    watch = MemoryWatch(lambda: share)
    core = AdmissionCore(OverloadLimits(), lambda: IDLE, watch.is_full)
    assert core.admit(0, 10) is None
    assert core.admit(0, 10) is None
    share = FULL
    assert core.admit(LOOK_EVERY_NS // 2, 10) is None, "nobody has looked yet"
    refusal = core.admit(LOOK_EVERY_NS, 10)
    assert refusal is not None
    assert (refusal.bound, refusal.retry_after_s) == ("memory", 1)
    assert core.num_refused["memory"] == 1
    share = 0.9
    assert core.admit(2 * LOOK_EVERY_NS, 10) is None


def test_a_request_that_comes_alone_is_let_in_for_nothing_else_would_give_memory_back() -> None:
    core = AdmissionCore(OverloadLimits(), lambda: IDLE, lambda _: True)
    assert core.admit(0, 10) is None
    assert core.admit(0, 10) is not None
