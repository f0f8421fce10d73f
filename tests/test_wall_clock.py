"""F-47: the wall clock may jump, so nothing but stamps for people is read from it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "gateway", "kernels", "messages", "models", "sim")
READINGS = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow"}

STAMPS = {
    "actors/engine/process.py": "when a journal was begun",
    "actors/tokenizer/chat_template.py": "the date that templates ask for",
    "gateway/bench_streams.py": "`created` of a response",
    "gateway/engine.py": "`created` of a model",
    "gateway/gpu_bench/command.py": "the date of a report",
    "gateway/lean_client.py": "compared with the system's stamps of packets, beside the monotonic clock",
    "gateway/local_graph.py": "when a journal was begun",
    "gateway/node.py": "a number that a later start exceeds; one that does not is refused, and told what to do",
    "gateway/openai_chat.py": "`created` of a response",
    "gateway/openai_completions.py": "`created` of a response",
    "gateway/telemetry.py": "when a span began",
    "gateway/supervision.py": "a number that differs between two runs",
}


def readings_in(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if not any(name in text for name in READINGS):  # quicker than to parse it
        return []
    tree = ast.parse(text)
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [name for name in map(ast.unparse, called) if name in READINGS]


def test_f_47_deadlines_and_durations_are_of_the_monotonic_clock() -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if readings_in(path)
    }
    assert found == set(STAMPS), "of a wall clock only a stamp may be read: say of what in STAMPS"


def test_readings_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import time\nwhile time.time() < 3: time.monotonic()\n")
    assert readings_in(tmp_path / "a.py") == ["time.time"]
