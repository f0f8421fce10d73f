"""The simulator has no scheduler, allocator, prefix cache, router or admission of its own; it runs the engine's."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.router.core import RouterCore
from octavo.actors.scheduler.core import SchedulerCore
from octavo.sim import cluster, replica

ROOT = Path(__file__).resolve().parent.parent.parent
SIM = sorted((ROOT / "sim").rglob("*.py"))
SIMULATED = [path for path in SIM if path.parts[-2] in ("sim", "workload", "step_time", "tables")]
ENGINES_OWN = re.compile(r"scheduler|allocator|block_?pool|prefix_?(index|cache|map)|router|admission", re.IGNORECASE)
# Taking a function of these by name would read the real world past the guard, which replaces it in its module.
DOORS = {"time", "datetime", "secrets", "uuid", "threading", "socket", "subprocess", "asyncio"}
# Commands that measure (and fuzz in processes of their own) are not on the simulated path.
MEASURE = {"core_bench.py", "bench.py", "guard.py", "calibration_loop.py"}


def test_the_classes_that_decide_are_the_engine_s() -> None:
    assert replica.SchedulerCore is SchedulerCore
    assert replica.KVAllocatorCore is KVAllocatorCore
    assert cluster.RouterCore is RouterCore
    for core in (SchedulerCore, KVAllocatorCore, RouterCore):
        assert Path(inspect.getfile(core)).parts[-3] == "actors"


@pytest.mark.parametrize("path", SIM, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_class_of_the_simulator_is_a_second_one_of_the_engine_s(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert not ENGINES_OWN.search(node.name), f"{path}: {node.name} belongs to the engine"
            for base in node.bases:
                assert not ENGINES_OWN.search(ast.unparse(base)), f"{path}: {node.name} changes one of the engine's"


@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_on_the_simulated_path_takes_a_door_to_the_real_world_by_name(path: Path) -> None:
    if path.name in MEASURE:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert str(node.module).split(".")[0] not in DOORS, f"{path}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("core", [SchedulerCore, KVAllocatorCore, RouterCore])
def test_no_core_takes_a_door_to_the_real_world(core: type) -> None:
    for path in sorted(Path(inspect.getfile(core)).parent.glob("*.py")):
        if path.name == "actor.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in DOORS | {"random"}, f"{path}: {name}"
