"""The script for a machine with a GPU, with parts that only pretend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.gateway.gpu_bench import command, device_check
from octavo.gateway.gpu_bench.check_tokens import equal_share, rows
from octavo.gateway.gpu_bench.device_check import PLAN, Check, Part, lines_of, main, missing_packages
from octavo.gateway.gpu_bench.gpu import GpuFacts
from octavo.gateway.gpu_bench.part import PARTS
from octavo.gateway.gpu_bench.parts import OnRow, PartResult

ROOT = Path(__file__).resolve().parents[3]
GOOD = {"kernel": "k", "shape": "s", "ok": True, "error": 1e-3, "bound": 1e-2, "worst": "w", "failures": []}
BAD = {**GOOD, "kernel": "broken", "ok": False, "failures": ["case: 1.00e+00"]}
CEILINGS = [
    {"kernel": "read", "us": 1000.0, "bytes": 4.3e9, "flops": 0},
    {"kernel": "product", "us": 1000.0, "bytes": 1, "flops": 790e9},
]

FACTS = GpuFacts(gpu="a GPU", driver="1", python="3", versions={"torch": "2"})
ALL_PARTS = [part for group in PLAN for part in group]


def answer(name: str) -> PartResult:
    found: list[dict[str, Any]] = [{"kernel": name, "shape": "s", "us": 1000.0, "bytes": 2.15e9}]
    if name == "ceilings":
        found = CEILINGS
    elif name == "checks":
        found = [GOOD]
    elif name == "tokens":
        found = [{**GOOD, "kernel": "tokens"}]
    elif name == "steps":
        found = [{"kernel": "decode step", "shape": "B=1 ctx=1024 graph", "batch": 1, "context": 1024, "ms": 0.6}]
    return PartResult(name=name, found=found)


@pytest.fixture(autouse=True)
def no_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "gpu_state", lambda: "1980 MHz")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], float]]:
    seen: list[tuple[str, dict[str, Any], float]] = []

    def run_part(name: str, options: dict[str, Any], *, timeout_s: float, on_row: OnRow, stall_s: float) -> PartResult:
        seen.append((name, options, timeout_s))
        for row in answer(name).found:
            on_row(row)
        return answer(name)

    say_all(monkeypatch, run_part)
    return seen


def say_all(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(device_check, "run_part", run)
    monkeypatch.setattr(device_check, "run_cases", run)


def test_it_writes_what_it_found_and_says_what_is_wrong_and_which_goals_are_met_last(
    asked: list[tuple[str, dict[str, Any], float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = Check(tmp_path, 480.0, FACTS)
    check.run([[part for part in group if part.name != "workload"] for group in PLAN])
    check.report()
    assert check.is_right
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1].startswith("2 checks, 0 wrong")
    assert "S1   decode step 0.6B, B=1, 1k" in out
    assert "goals: 2 of 2 that were measured are met" in out
    assert (tmp_path / "device_check.txt").read_text() == out
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert (found["gpu"], found["versions"], found["states"]["checks"]) == ("a GPU", {"torch": "2"}, "1980 MHz")
    shares = {row["what"]: row["share"] for row in found["rows"]}
    assert shares["products"] == pytest.approx(0.5)
    assert shares["qwen3-0.6b decode step"] == pytest.approx(0.304 / 0.6, abs=6e-3)
    assert {goal["name"]: goal["reached"] for goal in found["goals"]}["S2"] == "stretch"
    steps = next(options for name, options, _ in asked if name == "steps")
    assert (Path(steps["model"]).name, "shape" in steps) == ("qwen3-0.6b", False)


def test_wrong_kernels_and_parts_that_crash_make_it_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(name: str, options: dict[str, Any], *, timeout_s: float, on_row: OnRow, stall_s: float) -> PartResult:
        for row in (GOOD, BAD, {"kernel": "lost", "dtype": "bfloat16", "note": "failed: SIGSEGV: no word"}):
            on_row(row)
        return PartResult(name=name, found=[GOOD, BAD])

    say_all(monkeypatch, wrong)
    check = Check(None, 480.0, FACTS)
    check.run([[Part("checks", 20)]])
    check.report()
    assert not check.is_right
    out = capsys.readouterr().out
    assert "WRONG  broken" in out
    assert "WRONG  lost" in out and "SIGSEGV" in out
    say_all(
        monkeypatch,
        lambda name, options, **_: PartResult(name=name, found=[], failure="segfault", log="a traceback\n"),
    )
    check = Check(tmp_path, 480.0, FACTS)
    check.run([[Part("checks", 20)], [Part("products", 20)]])
    check.report()
    assert not check.is_right
    assert capsys.readouterr().out.count("segfault") == 2
    assert (tmp_path / "device_check.log").read_text().splitlines()[:2] == ["==== checks: segfault", "a traceback"]


def test_a_part_that_cannot_even_be_begun_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, options: dict[str, Any], *, on_row: OnRow, **_: Any) -> PartResult:
        if name == "tokens":
            raise OSError("no process")
        on_row(GOOD)
        return PartResult(name=name, found=[GOOD])

    say_all(monkeypatch, broken)
    check = Check(None, 480.0, FACTS)
    check.run([[Part("checks", 20), Part("tokens", 20)]])
    check.report()
    assert not check.is_right
    out = capsys.readouterr().out
    assert "2 checks, 1 wrong" in out and "OSError: no process" in out


def test_nothing_checked_is_not_right() -> None:
    assert not Check(None, 480.0, FACTS).is_right


def test_a_part_gets_no_more_time_than_is_left_and_none_is_started_without(
    asked: list[tuple[str, dict[str, Any], float]], capsys: pytest.CaptureFixture[str]
) -> None:
    check = Check(None, 30.0, FACTS)
    check.run([[Part("ceilings", 60)]])
    assert asked[0][2] <= 30.0
    check = Check(None, 5.0, FACTS)
    check.run([[Part("ceilings", 60)]])
    check.report()
    assert len(asked) == 1
    assert "no time left" in capsys.readouterr().out


def test_packages_that_engines_lack_are_named_and_kernels_are_measured_without_them(
    asked: list[tuple[str, dict[str, Any], float]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(device_check, "missing_packages", lambda names: [names[0]])
    monkeypatch.delenv("OCTAVO_FA3_LIBRARY", raising=False)
    check = Check(None, 480.0, FACTS)
    check.run(PLAN)
    check.report()
    of_engines = {"steps", "workload", "tokens", "start"}
    assert {name for name, _, _ in asked} == {part.name for part in ALL_PARTS} - of_engines - {"fa3", "flashinfer"}
    assert not check.is_right  # nobody has compared tokens
    out = capsys.readouterr().out
    assert "needs msgspec; bring them as wheels" in out
    assert "flashinfer is not there" in out and "OCTAVO_FA3_LIBRARY is not set" in out
    assert missing_packages(("json", "no_such_package_here")) == ["no_such_package_here"]


def test_the_script_imports_nothing_that_may_be_absent() -> None:
    code = (
        "import sys\n"
        "absent = ('msgspec', 'structlog', 'zmq', 'setproctitle', 'aiohttp', 'rich', 'tqdm')\n"
        "for name in absent: sys.modules[name] = None\n"
        "from octavo.gateway.gpu_bench import device_check, part\n"
        "print(device_check.missing_packages(('json',)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_the_script_runs_from_a_checkout_where_nothing_is_installed() -> None:
    script = ROOT / "gateway" / "gpu_bench" / "device_check.py"
    done = subprocess.run(
        [sys.executable, str(script), "--only", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no part nothing; there are ceilings" in done.stderr


def test_without_a_gpu_it_says_so_and_gives_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_plan_names_parts_that_exist_and_has_what_is_right_before_what_is_fast() -> None:
    assert {part.name for part in ALL_PARTS} - {"workload"} <= PARTS.keys()
    labels = [part.label for part in ALL_PARTS]
    assert labels[:4] == ["ceilings", "compile", "checks", "tokens"]
    told = ["steps qwen3-0.6b", "workload qwen3-0.6b octavo", "octavo", "steps qwen3-8b", "workload qwen3-8b octavo"]
    assert labels[4:9] == told, "what BENCHMARKS.md tells comes before everything else"
    assert len(set(labels)) == len(labels)


def test_engines_share_the_time_of_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def workload_of(*_: Any, **options: Any) -> tuple[list[Any], list[Any]]:
        given.append(options)
        return [], []

    monkeypatch.setattr(command, "workload_of", workload_of)
    Check(None, 30.0, FACTS).run([[Part("workload", 75, {"engines": ["octavo", "vllm"]}, "qwen3-0.6b")]])
    assert given[0]["engines"] == ["octavo", "vllm"]
    assert given[0]["all_within_s"] <= 30.0


def test_each_figure_is_in_the_file_as_soon_as_its_part_says_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(name: str, options: dict[str, Any], *, timeout_s: float, on_row: OnRow, stall_s: float) -> PartResult:
        on_row({"kernel": "first", "shape": "s", "us": 7.0})
        raise KeyboardInterrupt  # of whoever takes the machine back

    say_all(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        Check(tmp_path, 480.0, FACTS).run([[Part("products", 20)]])
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert [row["what"] for row in found["rows"]] == ["first"]


def test_cases_that_are_right_are_a_line_for_each_kernel_and_dtype_and_wrong_ones_a_line_each() -> None:
    one = {**GOOD, "dtype": "bfloat16"}
    lines = lines_of([one, {**one, "shape": "worse", "error": 9e-3}, {**one, "dtype": "float16"}, BAD, BAD])
    assert len(lines) == 4
    assert "2 cases bfloat16" in lines[0]
    assert "9.0e-03 of 1.0e-02" in lines[0] and lines[0].endswith("worse")
    assert [line.startswith("WRONG") for line in lines] == [False, False, True, True]
    assert len(lines_of([BAD] * 500)) < 30, "what stands behind them has to be seen"


def test_tokens_are_compared_up_to_each_request_s_first_difference() -> None:
    assert equal_share([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(4 / 6)
    assert equal_share([], []) == 1.0


def test_an_engine_on_a_cpu_gives_its_own_tokens() -> None:
    (row,) = rows(torch.device("cpu"), shape="")
    assert row["ok"]
    assert row["error"] == 0.0
