"""`octavo serve` whose log has no room left: standard error is `/dev/full`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
from c_library import HAS_C
from engines import save_servable
from process_family import named
from reserved_ports import reserved_port
from served_processes import PATIENCE_S, Client, streams, wait_until

NUM_STREAMS = 4
MAX_TOKENS = 600

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder, max_position_embeddings=8192)
    return folder


def is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/ready", timeout=PATIENCE_S) as response:
            return bool(response.status == 200)
    except (URLError, ConnectionError):
        return False


def test_f_46_a_server_whose_log_is_full_starts_serves_recovers_and_ends_as_ever(model: Path) -> None:
    flags = ["--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "2048", "--block-size", "4"]
    flags += ["--served-model-name", "tiny", "--max-model-len", "4096", *["--deterministic"] * HAS_C]
    with reserved_port() as port, Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", str(port), *flags]
        server = subprocess.Popen(command, cwd=model, stdout=full, stderr=full)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: is_ready(url) or server.poll() is not None)
            assert server.poll() is None
            calm = asyncio.run(streams(url, NUM_STREAMS, MAX_TOKENS))
            (executor,) = named("executor 0", server.pid)

            def kill(_: list[Client]) -> None:
                executor.kill()

            again = asyncio.run(streams(url, NUM_STREAMS, MAX_TOKENS, kill))
            assert [(client.error, client.text) for client in again] == [("", client.text) for client in calm]
            assert [client.finish_reason for client in again] == ["length"] * NUM_STREAMS
            family = psutil.Process(server.pid).children(recursive=True)
            server.terminate()
            assert server.wait(PATIENCE_S) == 0
            _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
            assert not alive
        finally:
            server.kill()
            server.wait()
