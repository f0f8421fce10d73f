"""Parts of the benchmark in processes: what they say counts, whatever becomes of them."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo.gateway.gpu_bench import parts
from octavo.gateway.gpu_bench.part import CASE_PARTS, CHECK_PARTS, KERNEL_PARTS, PARTS, PEER_PARTS
from octavo.gateway.gpu_bench.parts import Ended, OnLine, OnRow, PartResult, Start, run_cases, run_part, run_process

ROOT = Path(__file__).resolve().parents[3]


def saying(output: str, ended: Ended) -> Start:
    """A process that says just this."""

    def start(command: list[str], timeout_s: float, stall_s: float, on_line: OnLine) -> Ended:
        for line in output.splitlines():
            on_line(line)
        return ended

    return start


def test_every_line_that_is_a_figure_counts_and_nothing_else() -> None:
    output = '{"kernel": "a", "us": 1}\nhello\n[1]\n{"kernel": "b"}\n{"kernel": "c", "us'
    seen: list[str] = []
    result = run_part(
        "x", {}, timeout_s=1, on_row=lambda row: seen.append(row["kernel"]), start=saying(output, Ended("", 0))
    )
    assert [row["kernel"] for row in result.found] == seen == ["a", "b"]
    assert result.failure == ""


@pytest.mark.parametrize(
    ("ended", "why"),
    [
        (Ended("a warning\nRuntimeError: broken\n\n", 1), "RuntimeError: broken"),
        (Ended("", 139), "SIGSEGV: no word"),
        (Ended("x", 137, "no answer in 7 s", True), "no answer in 7 s"),
    ],
)
def test_a_part_that_fails_keeps_what_it_said_and_tells_why(ended: Ended, why: str) -> None:
    result = run_part("x", {}, timeout_s=7, start=saying('{"kernel": "a"}\n', ended))
    assert len(result.found) == 1
    assert result.failure == why
    assert result.log == ended.errors


def test_a_part_is_told_its_name_and_options() -> None:
    seen: list[list[str]] = []

    def start(command: list[str], timeout_s: float, stall_s: float, on_line: OnLine) -> Ended:
        seen.append(command)
        return Ended("", 0)

    run_part("steps", {"model": "here"}, timeout_s=1, start=start)
    assert seen[0][-2:] == ["steps", '{"model": "here"}']
    assert seen[0][-3].endswith("gpu_bench.part")


def test_the_case_that_a_part_is_at_is_known() -> None:
    output = (
        '{"case": 0, "of": 3, "what": {"kernel": "a"}}\n{"kernel": "a"}\n{"case": 1, "of": 3, "what": {"kernel": "b"}}'
    )
    result = run_part("x", {}, timeout_s=1, start=saying(output, Ended("", 134)))
    assert (result.case, result.num_cases, result.what) == (1, 3, {"kernel": "b"})
    assert result.found == [{"kernel": "a"}]


class Cases:
    """A part of so many cases in processes that some of them end."""

    def __init__(self, count: int, ends: dict[int, str], *, says: bool = False) -> None:
        self.count, self.ends, self.says, self.started = count, ends, says, list[int]()

    def run(self, name: str, options: dict[str, Any], *, timeout_s: float, stall_s: float, on_row: OnRow) -> PartResult:
        first = options.get("first_case", 0)
        self.started.append(first)
        found: list[dict[str, Any]] = []
        for case in range(first, self.count):
            what = {"kernel": f"case {case}"}
            row = {**what, "note": f"failed: {self.ends[case]}"} if case in self.ends else what
            if case not in self.ends or self.says:
                found.append(row)
                on_row(row)
            if case in self.ends:
                return PartResult(
                    name=name, found=found, failure=self.ends[case], case=case, num_cases=self.count, what=what
                )
        return PartResult(name=name, found=found, case=self.count - 1, num_cases=self.count)


@pytest.mark.parametrize("says", [True, False])
def test_behind_a_case_that_ends_its_process_another_one_goes_on(says: bool) -> None:
    cases, seen = Cases(5, {1: "an illegal access", 4: "SIGSEGV"}, says=says), list[dict[str, Any]]()
    result = run_cases("x", {"a": 1}, timeout_s=100, on_row=seen.append, run=cases.run)
    assert cases.started == [0, 2]
    assert result.failure == ""
    assert result.found == seen
    assert [row["kernel"] for row in seen] == [f"case {number}" for number in range(5)]
    assert [row.get("note") for row in seen] == [None, "failed: an illegal access", None, None, "failed: SIGSEGV"]


def test_where_every_case_ends_its_process_it_is_given_up() -> None:
    cases = Cases(50, dict.fromkeys(range(50), "lost"))
    result = run_cases("x", {}, timeout_s=100, run=cases.run)
    assert cases.started == [0, 1, 2, 3]
    assert result.failure == "lost"
    assert len(result.found) == 4


@pytest.mark.parametrize(
    "result",
    [
        PartResult(name="x", found=[], failure="no module"),
        PartResult(name="x", found=[], failure="no answer in 9 s", case=2, num_cases=9, ran_out=True),
    ],
)
def test_what_fails_before_its_first_case_or_has_no_time_is_not_begun_again(result: PartResult) -> None:
    starts: list[float] = []

    def run(_name: str, _options: dict[str, Any], **given: Any) -> PartResult:
        starts.append(given["timeout_s"])
        return result

    assert run_cases("x", {}, timeout_s=9, run=run).failure == result.failure
    assert len(starts) == 1 and starts[0] <= 9


def test_output_survives_a_process_that_runs_out_of_time() -> None:
    code = "import time; print('said', flush=True); time.sleep(60)"
    output: list[str] = []
    ended = run_process([sys.executable, "-c", code], 3.0, math.inf, output.append)
    assert output == ["said"]
    assert ended.stopped == "no answer in 3 s"
    assert ended.ran_out


def test_a_process_that_falls_silent_is_stopped_with_time_left() -> None:
    code = "import time; print('said', flush=True); time.sleep(600)"
    ended = run_process([sys.executable, "-c", code], 500.0, 0.5, lambda _line: None)
    assert (ended.stopped, ended.ran_out) == ("nothing new in 0.5 s", False)


def test_one_that_closes_its_output_and_goes_on_is_stopped_too() -> None:
    code = "import os, time; os.close(1); time.sleep(600)"
    ended = run_process([sys.executable, "-c", code], 3.0, math.inf, lambda _line: None)
    assert (ended.stopped, ended.ran_out) == ("no answer in 3 s", True)


def test_one_that_does_not_end_when_it_is_killed_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(parts, "_end", lambda process: started.append(process.pid))
    monkeypatch.setattr(parts, "_PATIENCE_S", 0.1)
    code = "import time; print(1, flush=True); time.sleep(600)"
    try:
        with pytest.warns(ResourceWarning):
            ended = run_process([sys.executable, "-c", code], 500.0, 0.2, lambda _line: None)
            gc.collect()
        assert ended.stopped == "nothing new in 0.2 s, and it would not end"
    finally:
        os.kill(started[0], signal.SIGKILL)
        os.waitpid(started[0], 0)


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
    ended = run_process(command, 60.0, math.inf, lambda line: children.append(psutil.Process(int(line))))
    assert (ended.errors, ended.status, ended.stopped) == ("broken\n", 3, "")
    _, alive = psutil.wait_procs(children, timeout=60)
    assert len(children) == 1
    assert not alive


def test_each_part_is_a_module_that_is_there() -> None:
    for module in PARTS.values():
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), module
    assert {*KERNEL_PARTS, *PEER_PARTS, *CHECK_PARTS, *CASE_PARTS} <= PARTS.keys()


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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_what_takes_the_device_with_it_is_one_failure_and_the_rest_is_done_by_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Checks in the interpreter, of which one kernel aborts its process, as a driver's fault may."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.endswith('kernels.gpu.device_checks'):\n"
        "            sys.meta_path.remove(self)\n"
        "            spec = importlib.util.find_spec(name)\n"
        "            execute = spec.loader.exec_module\n"
        "            def exec_module(module):\n"
        "                execute(module)\n"
        "                module.CHECKS['embedding'] = lambda setting: os.abort()\n"
        "            spec.loader.exec_module = exec_module\n"
        "            return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    names = ["rms_norm", "embedding", "gated_activation"]
    options = {"device": "cpu", "dtypes": ["float32"], "small": True, "only": names}
    result = run_cases("checks", options, timeout_s=300)
    assert result.failure == ""
    assert list(dict.fromkeys(row["kernel"] for row in result.found)) == names
    failed = [row for row in result.found if "note" in row]
    assert [row["kernel"] for row in failed] == ["embedding"]
    assert failed[0]["note"].startswith("failed: SIGABRT")
