"""`octavo sim`, as a user types it."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from journaled_ring import record_ring

from octavo.actors.scheduler.core import SchedulerCore
from octavo.gateway.cli import build_parser, main
from octavo.gateway.config import EngineConfig, make_config
from octavo.gateway.flags import engine_fields
from octavo.gateway.simulate.serve_command import FLAGS
from octavo.messages.step import PlanStep

SMALL = "synthetic:poisson,rate=8,n=40,prompt=400,output=20"


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace in the form of Azure's."""
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:15:{46 + i // 10:02}.{i % 10}805900,{300 + 7 * i},{10 + i % 30}" for i in range(60)]
    path = tmp_path_factory.mktemp("traces") / "conv.csv"
    path.write_text("\n".join(lines))
    return path


def run(*words: str) -> int:
    try:
        return main(["sim", *words])
    except SystemExit as exited:
        return int(exited.code or 0)


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Standard output is JSON and nothing else."""
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


# ---- run ----


def test_run_prints_json_alone_with_the_fixed_names(azure: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--trace", str(azure), "--replicas", "2", "--json") == 0
    found = as_json(capsys)
    assert len(str(found["event_log_sha256"])) == 64
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        figures = found[name]
        assert isinstance(figures, dict)
        assert {"mean", "p50", "p90", "p99"} <= set(figures)
        assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"]
    assert found["num_done"] == found["num_requests"] == 60
    assert found["config"]["gpu"] == "H100-SXM" and found["config"]["model"] == "llama-3.1-8b"  # type: ignore[index]
    assert found["config"]["num_replicas"] == 2  # type: ignore[index]


def test_run_gives_the_same_json_twice_and_with_fast_forward_off(
    azure: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for more in ([], [], ["--no-fast-forward"]):
        assert run("run", "--trace", str(azure), "--json", *more) == 0
        found.append(as_json(capsys))
    assert found[0] == found[1]
    assert found[2]["event_log_sha256"] == found[0]["event_log_sha256"]
    assert found[2]["num_steps_skipped"] == 0 and found[0]["num_steps_skipped"] != 0


def test_run_prints_a_table_and_writes_page_and_requests(
    azure: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, requests = tmp_path / "run.html", tmp_path / "requests.csv"
    slo = ["--slo", "ttft_p99<1s,tpot_p99<50ms"]
    assert run("run", "--trace", str(azure), *slo, "--html", str(page), "--requests-out", str(requests)) == 0
    out = capsys.readouterr().out
    assert "STABLE" in out and "TTFT" in out and "service level" in out and "met" in out
    assert page.read_text().startswith("<!doctype html>")
    rows = list(csv.DictReader(requests.read_text().splitlines()))
    assert len(rows) == 60 and {row["outcome"] for row in rows} == {"done"}


def test_every_flag_of_run_reaches_the_simulation(azure: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {
        "--max-num-seqs": ("16", "max_num_seqs", 16),
        "--max-num-batched-tokens": ("1k", "max_num_batched_tokens", 1000),
        "--block-size": ("32", "block_size", 32),
        "--num-gpu-blocks-override": ("500", "num_blocks", 500),
        "--max-model-len": ("4K", "max_model_len", 4096),
        "--routing": ("prefix-aware", "routing", "prefix_aware"),
        "--tensor-parallel-size": ("2", "tensor_parallel_size", 2),
        "--gpu": ("a100", "gpu", "A100-80GB"),
        "--long-prefill-token-threshold": ("256", "long_prefill_threshold", 256),
        "--max-num-queued-reqs": ("77", "max_num_queued_requests", 77),
        "--ingress-ms": ("2.5", "ingress_s", 0.0025),
        "--outage": ("0:1:2", "num_outages", 1),
    }
    words = [word for flag, (text, _, _) in flags.items() for word in (flag, text)]
    assert run("run", "--trace", str(azure), "--json", "--no-enable-prefix-caching", *words) == 0
    config = as_json(capsys)["config"]
    assert isinstance(config, dict)
    assert config["enable_prefix_caching"] is False
    for _, name, value in flags.values():
        assert config[name] == value


def test_the_load_can_be_cut_and_scaled(azure: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for name, words in {
        "all": [],
        "limit": ["--limit", "7"],
        "window": ["--window", "1:3"],
        "twice": ["--rate-scale", "2"],
        "short": ["--transform", "max_output=5"],
    }.items():
        assert run("run", "--trace", str(azure), "--json", *words) == 0
        found = as_json(capsys)
        counts[name] = found["num_requests"]
    assert counts == {"all": 60, "limit": 7, "window": 20, "twice": 120, "short": 60}


def test_what_is_too_long_can_be_refused_cut_or_dropped(azure: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for policy in ("refuse", "cut", "drop"):
        words = ["--max-model-len", "512", "--context", policy]
        assert run("run", "--trace", str(azure), "--json", *words) == 0
        result = as_json(capsys)
        found[policy] = (result["num_requests"], result["num_refused"])
    assert found["refuse"][0] == found["cut"][0] == 60 and found["drop"][0] < 60
    assert found["refuse"][1] > 0 and found["cut"][1] == found["drop"][1] == 0


def test_an_overloaded_run_carries_its_label_in_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--gpu", "L4", "--max-model-len", "2k", "--trace", "synthetic:constant,rate=30,n=900,output=40"]
    assert run(*words, "--json") == 0
    assert as_json(capsys)["load"] == "OVERLOADED"
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert out.index("OVERLOADED") < out.index("p99")
    assert "not what this configuration does" in " ".join(out.split())


def test_what_was_refused_is_told_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--trace", SMALL]
    assert run(*words, "--json") == 0
    result = as_json(capsys)
    assert result["load"] == "REFUSING"
    assert result["refused_because"] == {"queue_full": result["num_refused"]}
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert out.index("REFUSING") < out.index("p99")
    assert f"{result['num_refused']} refused: queue full" in out
    assert run("run", "--num-blocks", "2", "--trace", SMALL) == 0
    out = capsys.readouterr().out
    assert "0 of 40 done, 40 refused: context length exceeded" in out
    assert "– per million output tokens" in out


# ---- plan ----


def test_plan_finds_the_fewest_and_prints_what_starts_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpu", "A100,H100", "--slo", "ttft_p99<1s,tpot_p99<50ms", "--jobs", "1"]
    assert run("plan", "--trace", SMALL, "--json", "--max-num-batched-tokens", "512,2048", *words) == 0
    found = as_json(capsys)
    assert found["feasible"] is True
    candidates = found["candidates"]
    assert isinstance(candidates, list) and len(candidates) == 4
    chosen = found["chosen"]
    assert isinstance(chosen, dict)
    cheapest = min(one["cost_per_hour"] for one in candidates if one["verdict"] == "feasible")
    assert chosen["cost_per_hour"] == cheapest
    command = chosen["serve_command"].split()
    assert command[:2] == ["octavo", "serve"]
    arguments = build_parser().parse_args(command[1:])  # the engine's own flags take it
    config = make_config(engine_fields(arguments))  # and its own configuration
    assert config.num_blocks == chosen["replica"]["num_blocks"]
    assert config.max_num_batched_tokens == chosen["candidate"]["max_num_batched_tokens"]
    assert config.max_model_len == chosen["replica"]["max_sequence_len"]


def served_by(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[EngineConfig, list[str]]:
    """What the printed command starts, read by the parser of `octavo serve` itself; and the remarks on it."""
    slo = ["--slo", "ttft_p99<9s", "--jobs", "1", "--max-replicas", "4", "--no-diagnosis"]
    assert run("plan", "--trace", "synthetic:constant,rate=1,n=5,prompt=400,output=20", "--json", *slo, *words) == 0
    found = as_json(capsys)
    command = found["chosen"]["serve_command"].split()  # type: ignore[index]
    assert command[:2] == ["octavo", "serve"]
    remarks = found["remarks"]
    assert isinstance(remarks, list)
    return make_config(engine_fields(build_parser().parse_args(command[1:]))), remarks


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ([], "model", "meta-llama/Llama-3.1-8B"),
        (["--model", "qwen3-8b"], "model", "Qwen/Qwen3-8B"),
        (["--model", "meta-llama/Llama-3.1-8B-Instruct"], "model", "meta-llama/Llama-3.1-8B-Instruct"),
        (["--dtype", "float16"], "dtype", "float16"),
        (["--kv-cache-dtype", "fp8"], "kv_cache_dtype", "fp8"),
        (["--kv-cache-dtype", "auto"], "kv_cache_dtype", "auto"),
        (["--tensor-parallel-size", "2"], "tensor_parallel_size", 2),
        (["--max-model-len", "4K"], "max_model_len", 4096),
        (["--max-num-seqs", "7"], "max_num_seqs", 7),
        (["--max-num-batched-tokens", "512"], "max_num_batched_tokens", 512),
        (["--block-size", "32"], "block_size", 32),
        (["--num-gpu-blocks-override", "500"], "num_blocks", 500),
        (["--gpu-memory-utilization", "0.8"], "memory_utilization", 0.8),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--max-num-queued-reqs", "77"], "max_num_queued_requests", 77),
        (["--max-num-queued-tokens", "7777"], "max_num_queued_tokens", 7777),
        (["--long-prefill-token-threshold", "256"], "long_prefill_token_threshold", 256),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_command_of_a_plan_starts_what_was_simulated(
    words: list[str], field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    config, remarks = served_by(words, capsys)
    assert (getattr(config, field), remarks) == (value, [])


def test_the_test_above_names_every_flag_that_a_plan_prints() -> None:
    (mark,) = test_the_command_of_a_plan_starts_what_was_simulated.pytestmark  # type: ignore[attr-defined]
    assert {field for _, field, _ in mark.args[1]} == {"model", *FLAGS}


@pytest.mark.parametrize("words", [["--dtype", "fp8"], ["--dtype", "int4"], ["--kv-cache-dtype", "int4"]])
def test_what_was_simulated_and_cannot_be_served_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config, remarks = served_by(words, capsys)
    assert (config.dtype, config.kv_cache_dtype) == ("auto", "auto")
    assert len(remarks) == 1 and f"octavo serve cannot do {' '.join(words)}:" in remarks[0]


def test_a_plan_for_a_folder_serves_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 512}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 999, **sizes}))
    for given in (tmp_path, tmp_path / "config.json"):
        assert served_by(["--model", str(given)], capsys)[0].model == str(tmp_path)


def test_plan_prints_tables_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    words = ["--trace", SMALL, "--slo", "ttft_p99<2s", "--html", str(page), "--jobs", "1", "--max-replicas", "4"]
    assert run("plan", *words) == 0
    out = capsys.readouterr().out
    assert "octavo serve" in out and "what binds" in out and "meets" in out
    assert "Cost against latency" in page.read_text()


def test_capacity_is_a_multiple_of_the_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--capacity", "--trace", SMALL, "--slo", "ttft_p99<500ms", "--gpu", "L40S", "--no-diagnosis"]
    page = tmp_path / "capacity.html"
    assert run(*words, "--json", "--html", str(page)) == 0
    found = as_json(capsys)
    multiple = found["load_multiple"]
    assert isinstance(multiple, float) and multiple > 0
    assert math.isclose(math.log(multiple, 1.01), round(math.log(multiple, 1.01)), abs_tol=0.01)
    assert "Latency over load" in page.read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--slo", "ttft_p99<1ms"], "one prefill takes longer"),
        (["--slo", "tpot_p99<1ms"], "one decode step takes longer"),
        (["--slo", "ttft_p99<1s", "--gpu", "T4"], "does not fit"),
        (["--slo", "ttft_p99<1s", "--num-blocks", "20"], "longer than the 320 tokens"),
        (["--slo", "ttft_p99<1ms", "--capacity"], "capacity 0"),
    ],
)
def test_an_infeasible_ask_says_what_binds_and_exits_1(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "--trace", SMALL, "--jobs", "1", *words) == 1
    assert reason in " ".join(capsys.readouterr().out.split())
    assert run("plan", "--trace", SMALL, "--jobs", "1", "--json", *words) == 1
    assert as_json(capsys)["feasible"] is False


# ---- the others ----


def test_trace_tells_what_a_load_is_like(azure: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trace", "--trace", str(azure), "--json") == 0
    assert as_json(capsys)["num_requests"] == 60
    assert run("trace", "--trace", str(azure)) == 0
    assert "busiest minute" in capsys.readouterr().out


def test_fuzz_runs_the_seeds_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fuzz", "--seeds", "5", "--seed", "3", "--jobs", "1", "--json") == 0
    found = as_json(capsys)
    assert (found["first_seed"], found["num_seeds"], found["failure"]) == (3, 5, None)
    assert run("fuzz", "--seeds", "5", "--seed", "3", "--jobs", "1") == 0
    assert str(found["hash"]) in capsys.readouterr().out


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("journals") / "engine.journal"
    record_ring(path, seed=3)
    return path


def test_replay_finds_every_decision_again(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("replay", str(journal)) == 0
    assert "identical" in capsys.readouterr().out
    assert run("replay", str(journal), "--json") == 0
    assert as_json(capsys)["is_identical"] is True


def test_replay_stops_at_a_step_and_tells_why_a_request_waited(
    journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("replay", str(journal), "--until", "40", "--json") == 0
    state = as_json(capsys)["state"]
    assert isinstance(state, dict) and state["step"] >= 40  # of those planned, one more may be in flight
    assert run("replay", str(journal), "--until", "40") == 0
    out = capsys.readouterr().out
    assert f"after step {state['step']}" in out and all(str(one["request_id"]) in out for one in state["requests"])
    waited = {}
    for request_id in range(1, 30):
        if run("replay", str(journal), "--why", str(request_id), "--json") == 0:
            waited[request_id] = as_json(capsys)["waited"]
        capsys.readouterr()
    request_id, spans = max(waited.items(), key=lambda one: len(one[1]))  # type: ignore[arg-type]  # JSON
    assert isinstance(spans, list) and spans
    assert run("replay", str(journal), "--why", str(request_id)) == 0
    out = capsys.readouterr().out
    assert f"why request {request_id} waited" in out and spans[0]["constraint"] in out


def test_replay_shows_the_first_decision_that_came_out_otherwise(
    journal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = SchedulerCore.handle
    num_plans = 0

    def forgetful(self: SchedulerCore, message: object, now_ns: int) -> list[object]:
        nonlocal num_plans
        answers: list[object] = list(handle(self, message, now_ns))  # type: ignore[arg-type]  # passed on
        num_plans += any(isinstance(answer, PlanStep) for answer in answers)
        return [] if num_plans == 20 else answers

    monkeypatch.setattr(SchedulerCore, "handle", forgetful)
    assert run("replay", str(journal)) == 1
    out = capsys.readouterr().out
    assert "different" in out and "first difference" in out and "recorded" in out


def test_replay_compares_two_journals(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.journal"
    record_ring(other, seed=4)
    assert run("replay", str(journal), "--diff", str(journal)) == 0
    assert "the same" in capsys.readouterr().out
    assert run("replay", str(journal), "--diff", str(other)) == 1
    assert "first difference" in capsys.readouterr().out
    assert run("replay", str(journal), "--diff", str(other), "--json") == 1
    assert as_json(capsys)["is_same"] is False


# ---- bad input ----

BAD_TRACES = {
    "empty.csv": "",
    "header.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n",
    "word.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,many,44\n",
    "columns.csv": "a,b\n1,2\n",
    "broken.jsonl": '{"timestamp": 0, "input_length": 10, "output_length": 5, "hash_ids": [1]}\n{"timestamp": \n',
    "binary.csv": "\x00\x01\x02\x03",
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_malformed_trace_is_an_error_with_its_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(BAD_TRACES[name])
    assert run("run", "--trace", str(tmp_path / name)) == 2
    captured = capsys.readouterr()
    assert name in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_a_malformed_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "word.csv").write_text(BAD_TRACES["word.csv"])
    assert run("plan", "--trace", str(tmp_path / "word.csv"), "--slo", "ttft_p99<1s") == 2
    assert "word.csv:2" in capsys.readouterr().err.replace("line ", "").replace(", ", ":")


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["run", "--trace", "nowhere.csv"],
        ["run", "--trace", SMALL, "--gpu", "H1000000"],
        ["run", "--trace", SMALL, "--gpu", "T4"],
        ["run", "--trace", SMALL, "--model", "no-such-model"],
        ["run", "--trace", SMALL, "--routing", "random"],
        ["run", "--trace", SMALL, "--replicas", "0"],
        ["run", "--trace", SMALL, "--replicas", "-1"],
        ["run", "--trace", SMALL, "--rate-scale", "nan"],
        ["run", "--trace", SMALL, "--window", "5:2"],
        ["run", "--trace", SMALL, "--window", "5"],
        ["run", "--trace", SMALL, "--block-size", "1000"],
        ["run", "--trace", SMALL, "--num-blocks", "1", "--max-model-len", "4096"],
        ["run", "--trace", SMALL, "--gpu-memory-utilization", "1.5"],
        ["run", "--trace", SMALL, "--tensor-parallel-size", "7"],
        ["run", "--trace", SMALL, "--profile", "nowhere"],
        ["run", "--trace", SMALL, "--slo", "fast"],
        ["run", "--trace", SMALL, "--slo", "ttft_p99<-1s"],
        ["run", "--trace", SMALL, "--slo", ""],
        ["run", "--trace", SMALL, "--replicas", "100000000"],
        ["run", "--trace", SMALL, "--window", "1000:2000"],
        ["run", "--trace", SMALL, "--ingress-ms", "1e30"],
        ["run", "--trace", SMALL, "--outage", "0:1:1e200"],
        ["run", "--trace", ""],
        ["plan", "--trace", SMALL, "--slo", "ttft_p99<1s", "--window", "1000:2000"],
        ["calibrate", "-o", "/nonexistent/folder/profile.json"],
        ["calibrate", "-o", "/"],
        ["run", "--trace", SMALL, "--outage", "9:0:1"],
        ["run", "--trace", SMALL, "--outage", "0:5:1"],
        ["run", "--trace", SMALL, "--outage", "x"],
        ["run", "--trace", SMALL, "--ingress-ms", "-1"],
        ["run", "--trace", SMALL, "--ingress-ms", "inf"],
        ["run", "--trace", SMALL, "--context", "cut"],
        ["run", "--trace", SMALL, "--transform", "frobnicate=3"],
        ["run", "--trace", SMALL, "--price", "H100"],
        ["run", "--trace", SMALL, "--dtype", "int3"],
        ["run", "--trace", SMALL, "--max-num-seq", "4"],
        ["run", "--trace", "synthetic:poisson"],
        ["run", "--trace", "synthetic:nonsense,rate=1"],
        ["run", "--trace", SMALL, "--html", "/nonexistent/folder/x.html"],
        ["plan", "--trace", SMALL],
        ["plan", "--trace", SMALL, "--slo", "ttft_p99<1s", "--gpu", "H100,,A100"],
        ["plan", "--trace", SMALL, "--slo", "ttft_p99<1s", "--jobs", "0"],
        ["plan", "--trace", SMALL, "--slo", "ttft_p99<1s", "--max-refused", "2"],
        ["plan", "--trace", SMALL, "--slo", "ttft_p99<1s", "--capacity", "--gpu", "H100,A100"],
        ["plan", "--trace", SMALL, "--slo", "ttft_p99<1s", "--price", "H9=1"],
        ["trace", "--trace", "nowhere.csv"],
        ["replay", "nowhere.journal"],
        ["replay", "nowhere.journal", "--diff", "other", "--why", "3"],
        ["fuzz", "--seeds", "0"],
        ["fuzz", "--seed", "-1"],
        ["nonsense"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_hostile_command_line_is_one_clear_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("octavo") and "Traceback" not in captured.err
    assert captured.out == ""


def test_end_to_end_in_a_process_of_its_own(azure: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(BAD_TRACES["word.csv"])
    for words, status in (
        (["run", "--trace", str(azure), "--json"], 0),
        (["run", "--trace", str(tmp_path / "bad.csv")], 2),
        (["run", "--trace", str(azure), "--gpu", "none"], 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "octavo", "sim", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        if status == 0:
            assert json.loads(done.stdout)["num_done"] == 60 and done.stderr == ""
        else:
            assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_a_run_imports_neither_torch_nor_what_only_tables_need(azure: Path) -> None:
    code = (
        "import sys\nfrom octavo.gateway.cli import main\n"
        f"assert main(['sim', 'run', '--trace', {str(azure)!r}, '--json']) == 0\n"
        "assert not {'torch', 'transformers', 'aiohttp', 'rich', 'scipy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "command", [[], ["run"], ["plan"], ["trace"], ["calibrate"], ["validate"], ["replay"], ["fuzz"]]
)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help") == 0
    assert f"usage: {' '.join(['octavo', 'sim', *command])}" in capsys.readouterr().out


def test_a_replayed_journal_that_was_cut_short_is_said_to_be_incomplete(capsys, monkeypatch) -> None:
    from octavo.gateway.simulate import replay as sim_replay
    from octavo.sim.journal.reader import JournalEnd
    from octavo.sim.journal.replay import ReplayReport

    monkeypatch.setenv("COLUMNS", "200")
    said = []
    for end in (JournalEnd(True, "", 3, 99), JournalEnd(False, "the engine was killed", 3, 99)):
        fields = dict.fromkeys(ReplayReport.__struct_fields__, 0)
        fields |= {"path": "a", "model": "b", "octavo": "c", "started_at": "d", "ends": {}, "raised": ""}
        report = ReplayReport(**fields | {"end": end, "divergence": None})
        sim_replay._print_replay(report, shows_state=False, asked=None)
        said.append("incomplete" in capsys.readouterr().out)
    assert said == [False, True]
