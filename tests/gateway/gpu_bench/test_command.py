"""`octavo bench gpu`, as far as a machine without a GPU goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.gateway.cli import build_parser, main
from octavo.gateway.gpu_bench import command
from octavo.gateway.gpu_bench.ceilings import H200_NOTED
from octavo.gateway.gpu_bench.gpu import GpuFacts, why_no_gpu
from octavo.gateway.gpu_bench.parts import OnRow, PartResult
from octavo.gateway.gpu_bench.workload import EngineRun
from octavo.sim.step_time.known_models import find_model


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so_in_one_line_and_gives_2(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert "GPU" in captured.err
    assert why_no_gpu()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only", "kernel"], "there are ceilings, kernels"),
        (["--only", ""], "there are"),
        (["--repeats", "0"], "least 1"),
    ],
)
def test_a_wrong_flag_is_refused_with_what_there_is(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["bench", "gpu", *argv])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_flags_have_the_defaults_that_the_help_promises() -> None:
    arguments = build_parser().parse_args(["bench", "gpu"])
    assert arguments.only is None
    assert arguments.model_shape == ["qwen3-0.6b"]
    assert arguments.json is None
    assert build_parser().parse_args(["bench", "gpu", "--json"]).json == "-"
    assert build_parser().parse_args(["bench", "gpu", "--only", "steps,peers"]).only == ("steps", "peers")


CEILINGS = [
    {"kernel": "read", "us": 1000.0, "bytes": 4.3e9, "flops": 0},
    {"kernel": "product", "us": 1000.0, "bytes": 1, "flops": 790e9},
]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A GPU, parts and engines that answer at once; what they were asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def run_part(name: str, options: dict[str, Any], *, timeout_s: float, on_row: OnRow) -> PartResult:
        asked.append((name, options))
        found: list[dict[str, Any]] = [
            {"kernel": "attention", "shape": "s", "engine": name, "us": 10.0, "bytes": 4.3e7}
        ]
        if name == "ceilings":
            found = CEILINGS
        elif name == "steps":
            step = {"kernel": "decode step", "shape": "B=1 ctx=1024 graph", "batch": 1, "context": 1024, "ms": 0.6}
            found = [step]
        elif name == "flashinfer":
            return PartResult(name=name, found=[], failure="ModuleNotFoundError")
        for row in found:
            on_row(row)
        return PartResult(name=name, found=found)

    def run_engines(names: Any, options: Any, requests: Any, **_: Any) -> list[EngineRun]:
        asked.append(("workload", {"engines": list(names), "fields": options.engine_fields}))
        return [EngineRun(engine=name, load_s=1.0, seconds=(4.9,)) for name in names]

    monkeypatch.setattr(command, "why_no_gpu", lambda: "")
    monkeypatch.setattr(command, "gpu_facts", lambda: GpuFacts(gpu="a GPU", driver="1", python="3", versions={}))
    monkeypatch.setattr(command, "run_cases", run_part)
    monkeypatch.setattr(command, "run_engines", run_engines)
    return asked


def test_everything_is_measured_in_order_and_told_as_shares_of_what_was_measured_first(
    pretended: list[tuple[str, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gpu", "--out", str(tmp_path)]) == 0
    names = [name for name, _ in pretended]
    assert names[0] == "ceilings"
    assert names[1:4] == ["steps", "workload", "octavo"]
    assert "flashinfer" in names
    report = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert report["ceilings"]["read_bytes_per_s"] == pytest.approx(4.3e12)
    assert report["command"].startswith("octavo")
    shares = report["shares"]
    assert shares["kernels | attention | s | octavo"] == pytest.approx(1.0)
    assert shares["workload | 256 requests | qwen3-0.6b | octavo"] == pytest.approx(3.70 / 4.9, abs=2e-3)
    step = "steps | qwen3-0.6b decode step | B=1 ctx=1024 graph | octavo"
    assert shares[step] == pytest.approx(0.304 / 0.6, abs=6e-3)
    out = capsys.readouterr().out
    assert "27,340 tok/s" in out
    assert "failed: ModuleNotFoundError" in out  # a peer that fails is told, and is no failure of ours
    assert "S1" in out and "met, stretch too" in out
    fields = next(options["fields"] for name, options in pretended if name == "workload")
    assert (fields["performance_mode"], fields["max_num_seqs"], fields["load_format"]) == ("throughput", 256, "dummy")


def test_only_what_is_asked_for_is_measured_and_without_peers_octavo_alone(
    pretended: list[tuple[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gpu", "--only", "workload", "--model-shape", "qwen3-8b"]) == 0
    assert [name for name, _ in pretended] == ["ceilings", "workload"]
    assert pretended[1][1]["engines"] == ["octavo"]
    assert "qwen3-8b" in capsys.readouterr().out


def test_a_part_of_ours_that_fails_gives_1(
    pretended: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_cases(name: str, options: dict[str, Any], *, timeout_s: float, on_row: OnRow) -> PartResult:
        return PartResult(name=name, found=[], failure="no kernel image")

    monkeypatch.setattr(command, "run_cases", run_cases)
    assert main(["bench", "gpu", "--only", "ceilings"]) == 1
    assert "no kernel image" in capsys.readouterr().out


def test_what_is_known_is_in_the_file_when_it_is_stopped_and_without_time_nothing_is_begun(
    pretended: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = command.run_cases

    def stopped(name: str, options: dict[str, Any], **given: Any) -> PartResult:
        if name == "steps":
            raise KeyboardInterrupt
        return ran(name, options, **given)

    monkeypatch.setattr(command, "run_cases", stopped)
    with pytest.raises(KeyboardInterrupt):
        command.bench_gpu(build_parser().parse_args(["bench", "gpu", "--out", str(tmp_path)]))
    assert [row["what"] for row in json.loads((tmp_path / "bench_gpu.json").read_text())["rows"]] == ["read", "product"]
    assert "read" in capsys.readouterr().out
    pretended.clear()
    main(["bench", "gpu", "--seconds", "1", "--only", "steps,kernels"])
    assert pretended == []
    assert "no time left" in capsys.readouterr().out


def test_a_prompt_s_step_is_a_share_of_a_prompt_s_floor() -> None:
    found = {"kernel": "prefill step", "shape": "1 x 8192", "num_tokens": 8192, "ms": 37.8}
    row = command.step_row(found, find_model("qwen3-0.6b"), H200_NOTED, "qwen3-0.6b")
    assert row.share == pytest.approx(0.5, abs=5e-3)
    mixed = {**found, "num_tokens": 512, "batch": 255, "context": 1024, "ms": 10.0, "idle": 0.01}
    row = command.step_row(mixed, find_model("qwen3-0.6b"), H200_NOTED, "qwen3-0.6b")
    assert row.figure == "76,700 tok/s"
    assert row.floor_ms > 7.3 and row.values == {"idle": 0.01}
