"""The short form of `octavo chaos` on a real engine: a server in processes of its own, on a tiny checkpoint."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from c_library import HAS_C
from engines import save_servable
from reserved_ports import reserved_port

from octavo.gateway.chaos.cli import add_chaos
from octavo.gateway.chaos.faults import FaultNotDeliveredError
from octavo.gateway.flag_parser import Parser
from octavo.messages.errors import OctavoError

SERVER = """
import asyncio, sys
from octavo import Engine
from octavo.gateway.api.server import serve_http
from octavo.gateway.api.settings import ServerSettings

async def main(folder):
    engine = Engine(
        folder, in_process=False, dtype="float32", num_blocks=512, block_size=4, max_model_len=256, num_threads=1,
        deterministic=bool(sys.argv[2:]),
    )
    async with engine:
        settings = ServerSettings(log_requests=False, enable_fault_injection=True)
        await serve_http(engine, settings, port=0, on_listening=lambda port: print("listening", port, flush=True))

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("chaos") / "tiny"
    save_servable("llama", folder)
    command = [sys.executable, "-c", SERVER, str(folder), *["--deterministic"] * HAS_C]  # so `chaos` asks for it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    family: list[psutil.Process] = []
    try:
        for line in process.stdout:
            if line.startswith("listening "):
                break
        else:
            pytest.fail("the server ended before it listened")
        yield f"http://127.0.0.1:{line.split()[1]}"
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(180) == 0
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
        process.stdout.close()
    gone, alive = psutil.wait_procs(family, 120)
    assert not alive, f"orphans: {alive} (gone: {gone})"


def run_chaos(url: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    parser = Parser(prog="octavo")
    add_chaos(parser.add_subparsers(parser_class=Parser))
    common = ["chaos", "--url", url, "--streams", "8", "--every", "0.1", "--output-len", "60", "--json"]
    arguments = parser.parse_args([*common, *words])
    status = arguments.run(arguments)
    report: dict[str, object] = json.loads(capsys.readouterr().out)
    assert (status == 0) == report["is_passed"]
    return report


@pytest.mark.parametrize("victim", ["executor", "engine"])
@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_every_stream_goes_on_as_if_nothing_had_happened(
    url: str, capsys: pytest.CaptureFixture[str], victim: str, signal: str
) -> None:
    report = run_chaos(url, capsys, "--kill", victim, "--times", "2", "--signal", signal)
    assert report["is_passed"], report
    restarts = report["restarts"]
    assert isinstance(restarts, dict) and restarts[victim] >= 2


def test_the_edge_itself_is_killed_and_every_stream_is_taken_up_under_the_server_that_was_started_again(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("chaos") / "tiny"
    save_servable("llama", folder)
    flags = ["--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "512", "--block-size", "4"]
    words = ["--kill", "edge", "--times", "1", "--serve", str(folder), *flags, *["--deterministic"] * HAS_C]
    with reserved_port() as port:
        report = run_chaos(f"http://127.0.0.1:{port}", capsys, *words)
        assert report["is_passed"], report
        assert report["faults"] == {"edge KILL": 1}
        assert report["num_resumed"] or report["num_asked_anew"]
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server was ended with the run"


def test_an_edge_that_nobody_would_start_again_is_not_killed_and_what_is_needed_is_said(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FaultNotDeliveredError, match="--serve"):
        run_chaos(url, capsys, "--kill", "edge", "--times", "1")
    with pytest.raises(OctavoError, match="somebody listens"):
        run_chaos(url, capsys, "--kill", "edge", "--times", "1", "--serve")
