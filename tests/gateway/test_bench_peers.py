from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from engines import save_servable
from rich.console import Console

from octavo.actors.executor.cpu_topology import Cpu
from octavo.gateway import bench_peers as module
from octavo.gateway.bench_peers import same_cores
from octavo.gateway.ceilings import Ceilings, ModelTraffic
from octavo.gateway.cli import build_parser, main
from octavo.gateway.peers.adapter import LoadOptions, Peer
from octavo.gateway.peers.catalog import ADAPTERS, PEERS, make_peer
from octavo.gateway.peers.report import Cell, Report, ceiling_rates, print_report
from octavo.gateway.peers.workload import Workload, agreement, make_workloads, rate_of

LIMITS = Ceilings(
    num_threads=1, read_gb_per_s=10.0, read_one_stream_gb_per_s=8.0, f32_tflop_per_s=0.05, bf16_tflop_per_s=0.02
)
SMALL = ["--dtype", "float32", "--num-gpu-blocks-override", "128", "--block-size", "4", "--num-threads", "1"]


def parsed(*argv: str) -> argparse.Namespace:
    return build_parser().parse_args(["bench", "offline", "--peers", *argv])


def workloads(*argv: str) -> list[Workload]:
    arguments = parsed(*argv)
    arguments.input_len, arguments.output_len, arguments.concurrency = 128, 128, [1, 8]
    return make_workloads(arguments)


def test_workloads_are_decode_prefill_and_a_mixture_that_its_seed_decides() -> None:
    found = workloads()
    assert [(one.name, one.kind) for one in found] == [
        ("decode 1", "decode"),
        ("decode 8", "decode"),
        ("prefill 512", "prefill"),
        ("prefill 2048", "prefill"),
        ("mixed 32", "mixed"),
    ]
    assert found[1].lengths == ((128, 128),) * 8 and found[1].total_tokens == 2048
    assert found[3].lengths == ((2048, 1),) and found[3].longest == 2049
    mixed = found[4].lengths
    assert len(mixed) == 32
    assert all(32 <= prompt <= 512 and 16 <= output <= 256 for prompt, output in mixed)
    assert workloads()[4] == found[4] != workloads("--workload-seed", "1")[4]
    assert [one.kind for one in workloads("--no-mixed", "--prefill-len")] == ["decode", "decode"]


def test_decoding_counts_the_tokens_after_the_first_in_the_time_after_the_prompts() -> None:
    decode = Workload(name="d", kind="decode", lengths=((10, 5), (10, 5)))
    assert rate_of(decode, elapsed_s=3.0, prefill_s=1.0) == 8 / 2
    assert math.isnan(rate_of(decode, elapsed_s=1.0, prefill_s=1.0))
    assert rate_of(Workload(name="p", kind="prefill", lengths=((10, 1),)), 2.0, 0.0) == 5
    assert rate_of(Workload(name="m", kind="mixed", lengths=((9, 4), (9, 2))), 2.0, 0.0) == 3


def test_tokens_agree_up_to_the_first_difference() -> None:
    assert agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == 4 / 6


def test_ceilings_are_given_for_what_one_thing_bounds() -> None:
    traffic = ModelTraffic(weight_bytes=1e9, layer_weights=5e8, kv_bytes_per_token=0)
    rates = ceiling_rates(workloads(), LIMITS, traffic)
    assert rates["decode 8"] == pytest.approx(80) and rates["prefill 512"] == pytest.approx(50)
    assert "mixed 32" not in rates
    assert ceiling_rates(workloads(), LIMITS, None) == {}


def test_our_own_engines_are_bound_to_one_list_physical_cores_first() -> None:
    pairs = [Cpu(cpu, (0, cpu % 2), 0) for cpu in range(4)]  # 0 and 2 are one core, 1 and 3 the other
    assert [same_cores(pairs, count) for count in (2, 3, 4)] == ["0,1", "0,1,2", "0,1,2,3"]
    assert same_cores(pairs, 1) == same_cores(pairs, 5) == same_cores([], 2) == "off"


def run_bench(
    folder: Path, monkeypatch: pytest.MonkeyPatch, peers: list[str], *more: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr(module, "measure_ceilings", lambda num_threads: LIMITS)
    # A busy machine may stretch the prompts alone past the whole, and a rate is then dropped, rightly: not here.
    monkeypatch.setattr(module, "rate_of", lambda workload, elapsed_s, prefill_s: workload.total_tokens / elapsed_s)
    out = folder / "report.json"
    argv = ["bench", "offline", str(folder), *SMALL, "--input-len", "8", "--output-len", "4", "--concurrency", "1", "2"]
    argv += ["--prefill-len", "16", "4096", "--no-mixed", "--repeats", "2", "--json", str(out), *more]
    status = main([*argv, "--peers", *peers])
    return status, json.loads(out.read_text()) if out.exists() else {}


def test_peers_take_turns_and_one_that_fails_costs_its_own_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_servable("llama", tmp_path)
    peers = [f"fake_peers:{name}" for name in ("Counting", "Absent", "Crashing")]
    status, report = run_bench(tmp_path, monkeypatch, [*peers, "octavo-deterministic"])
    assert status == 0
    cells = {(cell["engine"], cell["workload"]): cell for cell in report["cells"]}
    for workload in ("decode 1", "decode 2", "prefill 16"):
        for engine in ("octavo", "fake_peers:Counting", "octavo-deterministic"):
            cell = cells[engine, workload]
            assert len(cell["rounds"]) == 2
            assert cell["low"] <= cell["tokens_per_s"] <= cell["high"]
        ours, counting = cells["octavo", workload], cells["fake_peers:Counting", workload]
        assert ours["ratio"] is None and ours["same_tokens"] is None
        assert counting["ratio"] == pytest.approx(ours["tokens_per_s"] / counting["tokens_per_s"])
        assert cells["octavo-deterministic", workload]["same_tokens"] == 1.0
        assert counting["same_tokens"] < 1.0
    assert set(report["left_out"]) == {"fake_peers:Absent", "fake_peers:Crashing", "prefill 4096"}
    assert "SIGABRT" in report["left_out"]["fake_peers:Crashing"]
    assert report["left_out"]["fake_peers:Absent"] == "not installed: anything"
    assert report["facts"]["fake_peers:Counting"]["model"] == "float32 by 1"
    printed = capsys.readouterr().out
    for words in ("fake_peers:Counting: counting 1.0", "left out: fake_peers:Absent", "(ceiling)"):
        assert words in printed.replace("\n", " ")


def test_when_the_last_engine_fails_what_was_measured_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_servable("llama", tmp_path)
    one_round = module._Bench._one_round

    def last_round(self: Any, *given: Any) -> None:
        one_round(self, *given)
        self._fail("octavo", "died")

    monkeypatch.setattr(module._Bench, "_one_round", last_round)
    status, report = run_bench(tmp_path, monkeypatch, ["octavo"])
    assert status == 0
    assert [(cell["workload"], len(cell["rounds"])) for cell in report["cells"]] == [("decode 1", 1)]
    assert report["left_out"]["octavo"] == "died"
    assert "left out: octavo: died" in capsys.readouterr().out


def test_one_that_is_ended_from_outside_reports_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_servable("llama", tmp_path)
    one_round = module._Bench._one_round

    def interrupted(self: Any, *given: Any) -> None:
        one_round(self, *given)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module._Bench, "_one_round", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    status, report = run_bench(tmp_path, monkeypatch, ["octavo"])
    assert status == 0
    assert [(cell["workload"], len(cell["rounds"])) for cell in report["cells"]] == [("decode 1", 1)]
    assert report["left_out"]["the rest"] == "interrupted after 1 of 6 runs"
    assert "interrupted after 1 of 6 runs" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_model_that_does_not_load_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = run_bench(tmp_path, monkeypatch, ["fake_peers:Counting"])
    assert status == 2
    assert "it needs tokenizer.json" in capsys.readouterr().err


def test_one_output_token_leaves_nothing_to_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = run_bench(tmp_path, monkeypatch, ["fake_peers:Counting"], "--output-len", "1")
    assert status == 2
    assert "--output-len 2 or more" in capsys.readouterr().err


def test_the_table_shows_a_failure_where_there_is_no_figure() -> None:
    workload = Workload(name="prefill 5", kind="prefill", lengths=((5, 1),))
    cell = Cell(
        engine="octavo", workload="prefill 5", tokens_per_s=25.0, low=24.0, high=126.0, ratio=None, rounds=[25.0],
        foreign_cores=0.1, cpu_s=1.0, same_tokens=None,
    )  # fmt: skip
    report = Report(
        model="m", dtype="float32", num_threads=1, repeats=1, workloads=[workload], cells=[cell],
        versions={"octavo": {}, "vllm": {"vllm": "1"}}, facts={"octavo": {}, "vllm": {}}, left_out={"vllm": "died [1]"},
        ceilings=LIMITS, ceiling_tokens_per_s={"prefill 5": 50.0},
    )  # fmt: skip
    out = io.StringIO()
    print_report(report, Console(file=out, width=100))
    lines = out.getvalue()
    assert "25.0" in lines and "126" in lines and "failed" in lines and "0.50x" in lines
    assert "left out: vllm: died [1]" in lines


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_peer_of_the_catalog_says_whether_it_can_run(name: str) -> None:
    peer: Peer = make_peer(name)
    why_not = peer.is_available(LoadOptions(folder="m", dtype="float32", num_threads=1, gguf="/no/such.gguf"))
    assert isinstance(why_not, str)
    assert isinstance(peer.versions(), dict)
    if name.startswith(("transformers", "octavo")):
        assert why_not == ""


def test_all_other_engines_are_measured_when_none_is_named() -> None:
    assert parsed().peers == []
    assert set(PEERS) == {
        "transformers-sequential", "transformers-static", "transformers-continuous",
        "llama.cpp", "openvino-genai", "vllm",
    }  # fmt: skip


def test_an_interpreter_is_named_for_one_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--peer-python", "vllm=/opt/vllm/bin/python").peer_python == [("vllm", "/opt/vllm/bin/python")]
    with pytest.raises(SystemExit):
        parsed("--peer-python", "vllm")
    assert "is not NAME=PATH" in capsys.readouterr().err
