"""F-47: the wall clock may jump, so nothing but stamps for people is read from it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "gateway", "kernels", "messages", "models", "sim")
MODULES = ("time", "datetime")
READINGS = {
    *(f"time.{name}" for name in ("time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime")),
    *(f"datetime.datetime.{name}" for name in ("now", "utcnow", "today")),
    "datetime.date.today",
}

STAMPS = {
    "actors/engine/process.py: EngineProcess._recorded": "when a journal was begun",
    "actors/tokenizer/chat_template.py: _strftime_now": "the date that templates ask for",
    "gateway/api/openai_chat.py: ChatAnswer.__init__": "`created` of a response",
    "gateway/api/openai_completions.py: CompletionAnswer.__init__": "`created` of a response",
    "gateway/api/telemetry.py: Trace._tell": "when a span began",
    "gateway/bench_streams.py: PacedEngine.__init__": "`created` of a response",
    "gateway/engine.py: Engine.__init__": "`created` of a model",
    "gateway/gpu_bench/command.py: _Bench.report": "the date of a report",
    "gateway/gpu_bench/device_check.py: Check.__init__": "the date of a report",
    "gateway/lean_client.py: _Connection.ask": "beside the monotonic clock, for the system's stamps of packets",
    "gateway/local_graph.py: LocalGraph.__init__": "when a journal was begun",
    "gateway/node.py: _serve": "a number that a later start exceeds; one that does not is refused, and told what to do",
    "gateway/processes/supervision.py: Footing.of": "a number that differs between two runs",
}


def names_of(tree: ast.AST) -> dict[str, str]:
    """What a module calls the clocks' modules and what is in them, and what that is."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The whole name of what is read, if it is a clock's; empty otherwise."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def readings_below(node: ast.AST, where: str, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """`(function, reading)`, whether it is called there or handed on."""
    for child in ast.iter_child_nodes(node):
        if (name := dotted(child, names)) in READINGS:
            yield where, name
        inner = where
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{where}.{child.name}".lstrip(".")
        yield from readings_below(child, inner, names)


def readings_in(path: Path) -> list[tuple[str, str]]:
    text = path.read_text(encoding="utf-8")
    if not any(module in text for module in MODULES):  # quicker than to parse it
        return []
    tree = ast.parse(text)
    return list(readings_below(tree, "", names_of(tree)))


def test_f_47_deadlines_and_durations_are_of_the_monotonic_clock() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {function}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for function, _ in readings_in(path)
    }
    assert found == set(STAMPS), "of a wall clock only a stamp may be read: say of what in STAMPS"


def test_readings_are_found_by_whatever_name_and_in_which_function(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import time, datetime\nfrom time import time as now, monotonic\n"
        "from datetime import datetime as d, timedelta\n"
        "class A:\n    def f(self):\n        while time.time() < 3: time.monotonic()\n"
        "def g(clock=now): return datetime.datetime.now(), d.utcnow(), timedelta(1), monotonic()\n"
    )
    assert sorted(readings_in(tmp_path / "a.py")) == [
        ("A.f", "time.time"),
        ("g", "datetime.datetime.now"),
        ("g", "datetime.datetime.utcnow"),
        ("g", "time.time"),
    ]
