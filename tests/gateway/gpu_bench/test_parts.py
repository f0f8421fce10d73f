"""Parts of the benchmark in processes: what they say counts, whatever becomes of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import psutil
import pytest

from octavo.gateway.gpu_bench.part import CHECK_PARTS, KERNEL_PARTS, PARTS, PEER_PARTS
from octavo.gateway.gpu_bench.parts import OnLine, Start, run_part, run_process

ROOT = Path(__file__).resolve().parents[3]


def saying(output: str, errors: str = "", status: int = 0) -> Start:
    """A process that says just this."""

    def start(command: list[str], timeout_s: float, on_line: OnLine) -> tuple[str, int]:
        for line in output.splitlines():
            on_line(line)
        return errors, status

    return start


def test_every_line_that_is_a_figure_counts_and_nothing_else() -> None:
    output = '{"kernel": "a", "us": 1}\nhello\n[1]\n{"kernel": "b"}\n{"kernel": "c", "us'
    seen: list[str] = []
    result = run_part("x", {}, timeout_s=1, on_row=lambda row: seen.append(row["kernel"]), start=saying(output))
    assert [row["kernel"] for row in result.found] == seen == ["a", "b"]
    assert result.failure == ""


@pytest.mark.parametrize(
    ("errors", "status", "why"),
    [("a warning\nRuntimeError: broken\n\n", 1, "RuntimeError: broken"), ("", 139, "no word"), ("x", -1, "in 7 s")],
)
def test_a_part_that_fails_keeps_what_it_said_and_tells_why(errors: str, status: int, why: str) -> None:
    result = run_part("x", {}, timeout_s=7, start=saying('{"kernel": "a"}\n', errors, status))
    assert len(result.found) == 1
    assert why in result.failure


def test_a_part_is_told_its_name_and_options() -> None:
    seen: list[list[str]] = []

    def start(command: list[str], timeout_s: float, on_line: OnLine) -> tuple[str, int]:
        seen.append(command)
        return "", 0

    run_part("steps", {"model": "here"}, timeout_s=1, start=start)
    assert seen[0][-2:] == ["steps", '{"model": "here"}']
    assert seen[0][-3].endswith("gpu_bench.part")


def test_output_survives_a_process_that_runs_out_of_time() -> None:
    code = "import time; print('said', flush=True); time.sleep(60)"
    output: list[str] = []
    _, status = run_process([sys.executable, "-c", code], 3.0, output.append)
    assert output == ["said"]
    assert status == -1


def test_nothing_that_a_part_has_begun_outlives_it() -> None:
    code = (
        "import subprocess, sys\n"
        "quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], **quiet)\n"
        "print(child.pid, flush=True)\n"
        "print('broken', file=sys.stderr, flush=True)\n"
        "sys.exit(3)\n"
    )
    children: list[psutil.Process] = []
    command = [sys.executable, "-c", code]
    errors, status = run_process(command, 60.0, lambda line: children.append(psutil.Process(int(line))))
    assert (errors, status) == ("broken\n", 3)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert len(children) == 1
    assert not alive


def test_each_part_is_a_module_that_is_there() -> None:
    for module in PARTS.values():
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), module
    assert {*KERNEL_PARTS, *PEER_PARTS, *CHECK_PARTS} <= PARTS.keys()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_part_runs_in_a_process_of_its_own_and_prints_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of one kernel, in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = {"device": "cpu", "dtypes": ["float32"], "small": True, "only": ["embedding", "gated_activation"]}
    result = run_part("checks", options, timeout_s=300)
    assert result.failure == ""
    assert [(row["kernel"], row["ok"]) for row in result.found] == [
        ("embedding", True),
        ("gated_activation", True),
        ("gated_activation", True),
    ], json.dumps(result.found)
