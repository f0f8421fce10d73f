"""Causes of advisories that can be seen in the source: what is compared, remembered, matched and depended on."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ON_REQUESTS_WAY = ("actors", "gateway", "messages")


def sources() -> list[Path]:
    return sorted(path for folder in ON_REQUESTS_WAY for path in (ROOT / folder).rglob("*.py"))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_sec_14_keys_are_compared_as_digests_in_constant_time() -> None:
    tree = tree_of(ROOT / "gateway" / "api" / "auth.py")
    (ring,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "KeyRing")
    assert "hmac.compare_digest(" in ast.unparse(ring)
    for node in ast.walk(ring):
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq | ast.In) for op in node.ops):
            compared = ast.unparse(node)
            assert "key" not in compared.lower() and "digest" not in compared.lower(), compared


BY_OUR_OWN_TYPES = {"schema_hash"}
"""Its arguments are the classes of messages."""


def unbounded_memos(tree: ast.Module) -> list[str]:
    """Functions with arguments whose every answer is remembered for ever."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        has_arguments = bool(node.args.args or node.args.kwonlyargs or node.args.vararg or node.args.kwarg)
        for decorator in node.decorator_list:
            text = ast.unparse(decorator)
            is_unbounded = text in {"cache", "functools.cache"} or "maxsize=None" in text or "lru_cache(None" in text
            if is_unbounded and has_arguments and node.name not in BY_OUR_OWN_TYPES:
                found.append(node.name)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sec_29_nothing_is_remembered_without_a_bound(path: Path) -> None:
    assert unbounded_memos(tree_of(path)) == []


def test_the_search_for_memos_finds_them() -> None:
    for decorator in ("cache", "functools.cache", "lru_cache(maxsize=None)", "functools.lru_cache(None)"):
        assert unbounded_memos(ast.parse(f"@{decorator}\ndef f(x): ...")) == ["f"]
    assert unbounded_memos(ast.parse("@lru_cache(maxsize=9)\ndef f(x): ...\n@cache\ndef g(): ...")) == []


REPEATED = (re._constants.MAX_REPEAT, re._constants.MIN_REPEAT)  # type: ignore[attr-defined]  # the parser's own names


def repeats_a_repetition(pattern: str | bytes) -> bool:
    """Whether something without a bound is repeated without a bound: it may be read in exponentially many ways."""

    def search(items: object, *, is_inside: bool) -> bool:
        if isinstance(items, re._parser.SubPattern):  # type: ignore[attr-defined]
            items = list(items)
        if isinstance(items, list):
            return any(search(item, is_inside=is_inside) for item in items)
        if isinstance(items, tuple):
            if len(items) == 2 and items[0] in REPEATED:
                _, most, body = items[1]
                is_open = most == re._constants.MAXREPEAT  # type: ignore[attr-defined]
                return (is_open and is_inside) or search(body, is_inside=is_inside or is_open)
            return any(search(item, is_inside=is_inside) for item in items)
        return False

    return search(re._parser.parse(pattern), is_inside=False)  # type: ignore[attr-defined]


LINES = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n"
"""Lines of a head may be repeated: each ends with what nothing within it matches."""


def patterns(tree: ast.Module) -> list[str | bytes]:
    found: list[str | bytes] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str | bytes):
                found.append(first.value.replace(LINES, b"x") if isinstance(first.value, bytes) else first.value)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sec_36_no_pattern_repeats_what_repeats(path: Path) -> None:
    assert [pattern for pattern in patterns(tree_of(path)) if repeats_a_repetition(pattern)] == []


def test_the_search_for_repeated_repetitions_finds_them() -> None:
    for bad in ("(a+)+b", r"(\w*,)*", "((x{2,})y?)*", rb"([^:]+:)+"):
        assert repeats_a_repetition(bad), bad
    for good in ("a+b*", "(ab){2,5}", "(?:a|b)+", "[a-z]{1,128}"):
        assert not repeats_a_repetition(good), good


def test_sec_43_the_http_library_is_none_with_known_holes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (aiohttp,) = (each for each in project["dependencies"] if each.startswith("aiohttp"))
    least = re.search(r">=(\d+)\.(\d+)\.(\d+)", aiohttp)
    assert least is not None, aiohttp
    assert tuple(map(int, least.groups())) >= (3, 14, 1)
