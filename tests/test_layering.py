"""The import table of the style guide, held against the code."""

from __future__ import annotations

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = {
    "messages": {"messages"},
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "actors": {"actors", "messages"},
    "sim": {"sim", "messages", "actors"},
    "gateway": {"gateway", "messages", "actors", "sim", "__init__"},
}
EXECUTOR_ALSO = {"models", "kernels"}
HEAVY = {"torch", "transformers", "triton"}


def modules() -> list[Path]:
    return sorted(
        path.relative_to(ROOT)
        for folder in ALLOWED
        for path in (ROOT / folder).rglob("*.py")
        if "shipped" not in path.parts
    )


def is_module(target: str) -> bool:
    return (ROOT / f"{target}.py").is_file() or (ROOT / target / "__init__.py").is_file()


def imports_in(text: str, path: Path) -> list[tuple[str, str]]:
    """`(target, statement)` of every import, targets inside the package as paths from the root, others as given."""
    found = []
    package = list(path.parts[:-1])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - (node.level - 1)], *(node.module or "").split(".")]
            whence = "/".join(part for part in base if part)
            inside = ["/".join(filter(None, (whence, alias.name))) for alias in node.names]
            targets = [target if is_module(target) else whence or "__init__" for target in inside]
            found += [(target, ast.unparse(node)) for target in dict.fromkeys(targets)]
        elif isinstance(node, ast.ImportFrom):
            found.append((f"external:{node.module}", ast.unparse(node)))
        elif isinstance(node, ast.Import):
            found += [(f"external:{alias.name}", ast.unparse(node)) for alias in node.names]
    return found


@functools.cache
def imports_of(path: Path) -> list[tuple[str, str]]:
    """`imports_in` a module of the package; read once, however many tests follow its imports."""
    return imports_in((ROOT / path).read_text(encoding="utf-8"), path)


def file_of(target: str) -> str:
    """A module's or a package's, from the root."""
    return f"{target}.py" if (ROOT / f"{target}.py").is_file() else f"{target}/__init__.py"


def circle_of(imports: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the one before it; none if there are no such."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def test_imports_form_no_circle_not_even_by_way_of_functions_or_for_types_alone() -> None:
    # The root's own module is none of them: it names, for types alone, what it loads when it is asked.
    graph = {
        str(path): {file_of(target) for target, _ in imports_of(path) if not target.startswith("external:")}
        - {str(path)}
        for path in [*modules(), Path("__main__.py")]
    }
    assert len(graph) > 300
    assert not circle_of(graph)


def test_circles_and_what_is_imported_are_found() -> None:
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle_of({"a": {"b", "c"}, "b": {"c"}})
    here = Path("kernels/gpu/somewhere.py")
    lines = "from .. import mixture, __all__\ndef f():\n    from ... import sim, __version__\n    import torch.nn\n"
    targets = {target for target, _ in imports_in(lines, here)}
    assert targets == {"kernels/mixture", "kernels", "sim", "__init__", "external:torch.nn"}
    for_types = "if TYPE_CHECKING:\n    from ..mixture import mixture\n"
    assert [target for target, _ in imports_in(for_types, here)] == ["kernels/mixture"]


ONLY_FROM = {
    "gateway/simulate": {"gateway/cli.py"},
    "gateway/chaos": {"gateway/cli.py", "gateway/bench_drain.py", "gateway/soak.py", "gateway/soak_holdings.py"},
}
"""Whoever serves needs none of it: it is for commands that try a server, or a machine."""


@pytest.mark.parametrize("path", [path for path in modules() if path.parts[0] == "gateway"], ids=str)
def test_the_server_needs_neither_what_tries_it_nor_the_interface_the_processes(path: Path) -> None:
    targets = {target for target, _ in imports_of(path)}
    for folder, users in ONLY_FROM.items():
        if str(path) not in users and not path.is_relative_to(folder):
            assert not any(Path(target).is_relative_to(folder) for target in targets), path
    if path.is_relative_to("gateway/api"):
        assert not any(Path(target).is_relative_to("gateway/processes") for target in targets), path


@pytest.mark.parametrize("path", modules(), ids=str)
def test_a_module_imports_only_what_the_table_allows(path: Path) -> None:
    folder = path.parts[0]
    allowed = set(ALLOWED[folder])
    if path.parts[:2] == ("actors", "executor"):
        allowed |= EXECUTOR_ALSO
    for target, statement in imports_of(path):
        if target.startswith("external:"):
            name = target.removeprefix("external:")
            assert name.split(".")[0] != "octavo", f"{path}: imports inside the package are relative: {statement}"
            continue
        assert target.split("/")[0] in allowed, f"{path}: {statement}"
        if folder == "sim" and target.startswith("actors/"):
            file = target.split("/")[-1]
            # `explain` reads a core's state, `sizing` is what the engine's start computes, `percentile` what is said of
            # figures, measured or not; the fault harness drives the mailboxes as well, to find faults in them, and an
            # engine's reports with the watch that hears them.
            known = {"core", "config", "routes", "clock", "explain", "percentile", "sizing"}
            if path.parts[:2] == ("sim", "faults"):
                known |= {"in_process", "lost_steps", "report"}
            assert file in known, f"{path}: sim drives cores alone: {statement}"


@pytest.mark.parametrize(
    "path", [p for p in modules() if p.parts[0] in ("messages", "sim") or p.name == "core.py"], ids=str
)
def test_messages_cores_and_simulator_never_import_torch(path: Path) -> None:
    heavy = _reachable_heavy(path, seen={})
    assert not heavy, f"{path} reaches {heavy}"


def _reachable_heavy(path: Path, seen: dict[Path, None]) -> list[str]:
    if path in seen:
        return []
    seen[path] = None
    heavy = []
    for target, _ in imports_of(path):
        if target.startswith("external:"):
            if target.removeprefix("external:").split(".")[0] in HEAVY:
                heavy.append(f"{path}: {target}")
            continue
        if is_module(target):
            heavy += _reachable_heavy(Path(file_of(target)), seen)
    return heavy
