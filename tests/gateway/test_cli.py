"""The command line, as a user types it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engines import engine_on, save_servable
from structlog.testing import capture_logs

from octavo.gateway.api.server import start_http
from octavo.gateway.api.settings import ServerSettings
from octavo.gateway.cli import build_parser, main
from octavo.gateway.config import EngineConfig, make_config
from octavo.gateway.flags import ENGINE_FIELDS, FIELDS_WITHOUT_ENGINE_FLAG, engine_fields
from octavo.gateway.generation_config import GenerationConfig
from octavo.gateway.serve import SPARE_FILES, check_address, connections_within_files, greet, report_throughput
from octavo.gateway.server_flags import server_fields

SMALL = ["--dtype", "float32", "--num-gpu-blocks-override", "128", "--block-size", "4", "--max-model-len", "96"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    save_servable("llama", folder)
    return folder


def exit_status(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as exited:
        return int(exited.code or 0)


# ---- flags ----


@pytest.mark.parametrize(
    "command", [[], ["serve"], ["run"], ["bench"], ["bench", "offline"], ["bench", "serve"], ["doctor"]]
)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status([*command, "--help"]) == 0
    assert f"usage: {' '.join(['octavo', *command])}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["bench"]])
def test_a_command_that_needs_another_lists_them(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(command) == 0
    assert "serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve", "--max-num-seq", "4"], ["unknown flag --max-num-seq", "did you mean --max-num-seqs?"]),
        (["run", "--promt=hi"], ["unknown flag --promt", "did you mean --prompt?"]),
        (["bench", "offline", "--concurency", "4"], ["did you mean --concurrency?"]),
        (["doctor", "--zzzzzz"], ["unknown flag --zzzzzz"]),
        (["doctor", "extra"], ["unexpected argument 'extra'"]),
        (["serve", "--block-size", "many"], ["'many' is not a number such as 4096, 8k or 2G"]),
        (["serve", "--block-size", "1.5"], ["'1.5' is not a whole number"]),
        (["serve", "--port", "70000"], ["'70000' is not a port"]),
        (["serve", "--trusted-proxies", "proxy"], ["'proxy' is not an IP address or a network"]),
        (["serve", "--allowed-hosts", "http://box"], ["'http://box' is not a host name"]),
        (["serve", "--allowed-origins", "box.example"], ["'box.example' is not an origin", "http://localhost:3000"]),
        (["serve", "--allowed-origins", "https://box.example/"], ["is not an origin"]),
        (["serve", "--api-key", ""], ["it is empty, and would let everybody in"]),
        (["serve", "--api-key", " key"], ["printable ASCII without spaces"]),
        (["serve", "--log-interval", "nan"], ["'nan' is not a number of seconds from 0 up"]),
        (["serve", "--log-interval", "-1"], ["'-1' is not a number of seconds from 0 up"]),
        (["serve", "--priority-aging", "nan"], ["'nan' is not a number of seconds from 0 up"]),
        (["serve", "--dtype", "int3"], ["float32"]),
        (["bench", "offline", "--concurrency", "0"], ["at least 1"]),
        (["bench", "offline", "--repeats", "0"], ["at least 1"]),
        (["bench", "serve", "--request-rate", "0"], ["is not a rate"]),
        (["serv"], ["serve"]),
    ],
)
def test_a_slip_is_one_line_that_helps(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(argv) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_flags_set_every_field_that_they_name_and_default_to_the_struct_s() -> None:
    parser = build_parser()
    assert make_config(engine_fields(parser.parse_args(["serve"]))) == EngineConfig()
    assert set(EngineConfig.__struct_fields__) == {*ENGINE_FIELDS, *FIELDS_WITHOUT_ENGINE_FLAG}
    assert all(FIELDS_WITHOUT_ENGINE_FLAG.values())
    flags = {
        "--tokenizer": ("tokenizer", "there"),
        "--revision": ("revision", "main"),
        "--dtype": ("dtype", "float16"),
        "--model-impl": ("model_impl", "native"),
        "--quantization": ("quantization", "int4"),
        "--deterministic": ("deterministic", True),
        "--trust-remote-code": ("trust_remote_code", True),
        "--offline": ("offline", True),
        "--chat-template": ("chat_template", "{{ messages }}"),
        "--max-model-len": ("max_model_len", 77),
        "--max_num_seqs": ("max_num_seqs", 3),
        "--max-num-batched-tokens": ("max_num_batched_tokens", 33),
        "--block-size": ("block_size", 8),
        "--kv-cache-memory-bytes": ("kv_cache_memory_bytes", 12345),
        "--gpu-memory-utilization": ("memory_utilization", 0.25),
        "--num-gpu-blocks-override": ("num_blocks", 9),
        "--no-enable-prefix-caching": ("enable_prefix_caching", False),
        "--max-num-queued-reqs": ("max_num_queued_requests", 5),
        "--max-num-queued-tokens": ("max_num_queued_tokens", 500),
        "--priority-aging": ("priority_aging_s", 2.5),
        "--long-prefill-token-threshold": ("long_prefill_token_threshold", 44),
        "--pipeline-depth": ("pipeline_depth", 1),
        "--seed": ("seed", 4),
        "--num-threads": ("num_threads", 2),
        "--max-logprobs": ("max_logprobs", 7),
        "--journal": ("journal", "incident.journal"),
        "--journal-prompts": ("journal_prompts", True),
        "--kv-cache-dtype": ("kv_cache_dtype", "int8"),
        "--tensor-parallel-size": ("tensor_parallel_size", 2),
        "--pipeline-parallel-size": ("pipeline_parallel_size", 3),
        "--data-parallel-size": ("data_parallel_size", 4),
        "--enable-expert-parallel": ("enable_expert_parallel", True),
        "--routing": ("routing", "round_robin"),
        "--max-restarts": ("max_restarts", 0),
        "--cpu-affinity": ("cpu_affinity", "0-1"),
        "--no-in-process": ("in_process", False),
        "--device": ("device", "cpu"),
        "--performance-mode": ("performance_mode", "interactivity"),
        "--cuda-graph-sizes": ("cuda_graph_sizes", (3,)),
        "--cuda-graph-tokens": ("cuda_graph_tokens", (5,)),
        "--load-format": ("load_format", "dummy"),
        "--generation-config": ("generation_config", "vllm"),
        "--override-generation-config": ("override_generation_config", GenerationConfig(top_k=2)),
    }
    assert {name for name, _ in flags.values()} | {"model"} == set(ENGINE_FIELDS)
    argv = ["serve", "here"]
    for flag, (_, value) in flags.items():
        word = json.dumps(value.said()) if isinstance(value, GenerationConfig) else value
        argv += [flag] if isinstance(value, bool) else [flag, str(word[0] if isinstance(word, tuple) else word)]
    expected = EngineConfig(model="here", **dict(flags.values()))
    assert make_config(engine_fields(parser.parse_args(argv))) == expected


def test_flags_of_the_server_set_its_settings_and_default_to_the_struct_s() -> None:
    parse = build_parser().parse_args
    defaults = ServerSettings(**server_fields(parse(["serve"])))
    assert defaults == msgspec.structs.replace(ServerSettings(), shutdown_timeout_s=30.0)
    argv = "--api-key a --api-key b --allowed-origins https://x.example --allowed-hosts Box.Example * "
    argv += "--max-connections 7 --max-connections-per-client 0 --trusted-proxies 10.1.2.3/8 ::1 --shutdown-timeout 2"
    argv += " --request-timeout 1.5m"
    assert ServerSettings(**server_fields(parse(["serve", *argv.split()]))) == ServerSettings(
        api_keys=("a", "b"),
        allowed_origins=("https://x.example",),
        allowed_hosts=("box.example", "*"),
        max_connections=7,
        max_connections_per_client=0,
        trusted_proxies=("10.0.0.0/8", "::1/128"),
        shutdown_timeout_s=2.0,
        request_timeout_s=90.0,
    )


def test_an_address_that_cannot_be_listened_on_is_known_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert exit_status(["serve", "/no/such/model", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"port {port}" in error and "--port" in error and len(error.splitlines()) == 1
    assert exit_status(["serve", "/no/such/model", "--host", "192.0.2.1", "--port", "0"]) == 1  # of documents alone
    error = capsys.readouterr().err
    assert "--host" in error and len(error.splitlines()) == 1
    for is_shared in (False, True):
        check_address("localhost", port, is_shared=is_shared)


def test_no_line_of_throughput_is_written_where_none_is_asked_for() -> None:
    asyncio.run(asyncio.wait_for(report_throughput(None, 0.0), 30))  # type: ignore[arg-type]  # it is not looked at


def test_a_context_past_the_model_s_own_is_served_to_its_end_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> int:
        async with engine_on(folder, max_model_len=2**40) as engine:
            with capture_logs() as lines:
                greet(engine, "tiny", build_parser().parse_args(["serve", "--host", "::1"]), 8000, 0.0)
            assert lines[0]["event"] == "server.context_is_shorter" and lines[0]["asked"] == 2**40
            assert lines[-1]["url"] == "http://[::1]:8000"
            return engine.max_model_len

    assert asyncio.run(run()) == json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_connections_are_fewer_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [100, 1000]
    monkeypatch.setattr("resource.getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr("resource.setrlimit", lambda kind, new: limits.__setitem__(slice(None), new))
    assert connections_within_files(5000) == 1000 - SPARE_FILES
    assert limits == [1000, 1000]
    assert connections_within_files(0) == 1000 - SPARE_FILES
    assert connections_within_files(10) == 10


# ---- commands ----


@pytest.mark.parametrize(
    ("command", "rest"), [(["run"], ["--prompt", "hi"]), (["bench", "offline"], []), (["serve"], ["--port", "0"])]
)
def test_a_wrong_model_name_is_one_clear_line(
    command: list[str], rest: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert exit_status([*command, "no-such/model-anywhere", *rest, "--offline"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("octavo: ")
    assert "no-such/model-anywhere" in error
    assert len(error.splitlines()) == 1


def test_a_configuration_out_of_range_is_one_clear_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["run", str(folder), "--block-size", "300", "--prompt", "hi"]) == 2
    assert capsys.readouterr().err == "octavo: block_size is 300, but must be from 1 to 256\n"


def test_run_answers_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", str(folder), "--prompt", "hi", "--system", "Be brief.", "--max-tokens", "5", *SMALL]
    assert exit_status([*argv, "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip()
    # More than the context has room for is as much as it has room for.
    assert exit_status([*argv, "--temperature", "0", "--max-tokens", "4k"]) == 0


def test_doctor_finds_nothing_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["doctor"]) == 0
    assert "torch threads" in capsys.readouterr().out


def test_bench_offline_prints_a_table_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "offline", str(folder), *SMALL, "--input-len", "6", "--output-len", "4", "--concurrency", "1", "2"]
    assert exit_status([*argv, "--repeats", "1", "--num-prompts", "3", "--compare-prompts", "1", "--json", "-"]) == 0
    out = capsys.readouterr().out
    assert "octavo bench offline: 6 in, 4 out, 1 rounds" in out
    figures = json.loads(out[out.index("{") :])["figures"]
    assert [figure["concurrency"] for figure in figures] == [1, 2]
    assert all(figure["octavo_tokens_per_s"] > 0 and figure["ratio"] > 0 for figure in figures)


@dataclasses.dataclass
class Served:
    """A server on a loop in a thread."""

    port: int
    engine: Any


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    ready = threading.Event()
    found: list[Served] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with engine_on(folder) as engine:
            server = await start_http(engine, ServerSettings(log_requests=False), port=0)
            found.append(Served(server.port, engine))
            ready.set()
            await stop.wait()
            await server.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            try:
                runner.run(serve())
            finally:
                ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(300)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def test_bench_serve_measures_a_running_server(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ["bench", "serve", "--base-url", f"http://127.0.0.1:{served.port}"]
    work = ["--num-prompts", "6", "--input-len", "5", "--output-len", "4"]
    assert exit_status([*url, *work, "--json", str(tmp_path / "out.json")]) == 0
    assert "time to first token" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["num_requests"], report["num_failed"]) == (6, 0)
    assert served.engine.stats().generation_tokens >= 24
    assert exit_status([*url, "--num-prompts", "2", "--input-len", "500"]) == 1  # too long: each is refused
    assert "first failure: 400" in capsys.readouterr().out


def test_bench_serve_without_a_server_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["bench", "serve", "--base-url", "http://127.0.0.1:1"]) == 2
    assert "no server answers at this --base-url" in capsys.readouterr().err


# ---- a conversation in a terminal ----


@pytest.mark.parametrize("moment", ["at the prompt", "during an answer", "at the end of input"])
def test_a_conversation_ends_without_a_traceback(folder: Path, moment: str) -> None:
    ours, theirs = pty.openpty()
    argv = ["run", str(folder), "--dtype", "float32", "--num-gpu-blocks-override", "128", "--block-size", "4"]
    argv += ["--num-threads", "1", "--temperature", "0", "--max-tokens", "400", "--chat-template", "{{ messages }}"]
    chat = subprocess.Popen(
        [sys.executable, "-m", "octavo", *argv],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    try:
        assert chat.stdout is not None
        read = b""
        while b"> " not in read:
            read += (piece := os.read(chat.stdout.fileno(), 4096))
            assert piece, chat.communicate()
        if moment == "at the end of input":
            os.write(ours, b"\x04")
        else:
            if moment == "during an answer":
                os.write(ours, b"hello\n")
                assert os.read(chat.stdout.fileno(), 1)
            chat.send_signal(signal.SIGINT)
        _, errors = chat.communicate(timeout=180)
    finally:
        chat.kill()
        os.close(ours)
    assert chat.returncode == (0 if moment == "at the end of input" else 130), errors
    assert b"Traceback" not in errors
