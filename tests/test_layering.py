"""The import table of the style guide, held against the code."""

from __future__ import annotations

import ast
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


def imports_of(path: Path) -> list[tuple[str, str]]:
    """`(target, statement)` of every import, targets inside the package as paths from the root, others as given."""
    found = []
    package = list(path.parts[:-1])
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            module = node.module.split(".") if node.module else []
            if base or module:
                names = [] if module or base else [alias.name for alias in node.names]
                targets = ["/".join([*base, *module, *([tail] if tail else [])]) for tail in names or [""]]
                found += [(target, ast.unparse(node)) for target in targets]
            else:
                found.append(("__init__", ast.unparse(node)))
        elif isinstance(node, ast.ImportFrom):
            found.append((f"external:{node.module}", ast.unparse(node)))
        elif isinstance(node, ast.Import):
            found += [(f"external:{alias.name}", ast.unparse(node)) for alias in node.names]
    return found


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
            # `explain` reads a core's state, `sizing` is what the engine's start computes; the fault harness drives the
            # mailboxes as well, to find faults in them.
            known = {"core", "config", "routes", "clock", "explain", "sizing"}
            if path.parts[:2] == ("sim", "faults"):
                known |= {"in_process"}
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
        for candidate in (Path(f"{target}.py"), Path(target) / "__init__.py"):
            if (ROOT / candidate).is_file():
                heavy += _reachable_heavy(candidate, seen)
    return heavy
