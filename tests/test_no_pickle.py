"""Nothing in the package unpickles, evaluates or executes what it reads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("actors", "gateway", "kernels", "messages", "models", "sim")

MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle",
    "multiprocessing", "billiard", "loky", "joblib",
}  # fmt: skip
"""The last ones pickle what they send between processes."""
CALLS = {"eval", "exec", "ProcessPoolExecutor"}
ATTRIBUTES = {
    "recv_pyobj", "send_pyobj", "unsafe_load", "full_load", "ProcessPoolExecutor", "broadcast_object_list",
    "all_gather_object", "gather_object", "scatter_object_list", "send_object_list", "recv_object_list",
}  # fmt: skip
QUALIFIED = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("joblib", "load"), ("pandas", "read_pickle")}
ALLOWS_PICKLE = {"allow_pickle", "weights_only"}


BETWEEN_ITS_OWN_PROCESSES = {
    "sim/faults/fuzz.py": "seeds and hashes",
    "sim/plan/planner.py": "layouts and what they were found to do",
    "kernels/gpu/compile_variants.py": "names of kernels to compile",
}
"""What they send to and from processes that they start themselves, over pipes that nobody else has an end of."""

PLANTS_BUGS = "sim/faults/mutation.py"
"""Compiles this package's own source with one line changed, to see the fault finder find it; it reads nothing else."""


def sources() -> list[Path]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "shipped" not in path.parts]
    return sorted(paths) + sorted(ROOT.glob("*.py"))


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = (node.module or "").split(".")[0]
            if module in MODULES or any((module, alias.name) in QUALIFIED for alias in node.names):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in CALLS | {"__import__", "compile"}:
                found.append(ast.unparse(node)[:60])
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                if function.attr in ATTRIBUTES or (owner, function.attr) in QUALIFIED:
                    found.append(ast.unparse(node)[:60])
            found += [
                f"{keyword.arg}={ast.unparse(keyword.value)}"
                for keyword in node.keywords
                if keyword.arg in ALLOWS_PICKLE
                and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is (keyword.arg != "allow_pickle")
                )
            ]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_evaluates_or_executes_what_it_reads(path: Path) -> None:
    found = findings(path.read_text())
    if path == ROOT / PLANTS_BUGS:
        found = [
            finding
            for finding in found
            if not finding.startswith(("exec(compile(self._source", "compile(self._source"))
        ]
    if str(path.relative_to(ROOT)) in BETWEEN_ITS_OWN_PROCESSES:
        allowed = ("multiprocessing", "from multiprocessing import get_context", "ProcessPoolExecutor(")
        found = [finding for finding in found if not finding.startswith(allowed)]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill as d",
        "from marshal import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "socket.recv_pyobj()",
        "eval(text)",
        "exec(text)",
        "import yaml\nyaml.load(text)",
        "numpy.load(path, allow_pickle=True)",
        "__import__(name)",
        "import multiprocessing",
        "from multiprocessing import Pipe",
        "from concurrent.futures import ProcessPoolExecutor\nProcessPoolExecutor(2)",
        "torch.distributed.broadcast_object_list(objects)",
    ],
)
def test_the_scan_finds_what_it_is_for(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_hi_125_processes_share_no_memory_that_a_dying_one_could_leave_half_written(path: Path) -> None:
    """Every message goes through a socket, with a checksum; so there is no ring whose header could be damaged."""
    imported = {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    rings = ("shared_memory", "sharedctypes")
    shared = (*(f"multiprocessing.{ring}" for ring in rings), "posix_ipc", "torch.multiprocessing", "_posixshmem")
    assert not [name for name in imported if any(name == bad or name.startswith(f"{bad}.") for bad in shared)]
