"""Every test of this folder, by name, as it is written."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent


@cache
def by_name() -> dict[str, tuple[str, ...]]:
    """The modules, from this folder on, that have a test of a name."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found[node.name] = (*found.get(node.name, ()), str(path.relative_to(TESTS)))
    return found


def names_with(mark: str) -> list[str]:
    """Names of the tests that carry a mark such as `f_05`, as a word of theirs."""
    return [name for name in by_name() if f"_{mark}_" in f"{name}_"]
