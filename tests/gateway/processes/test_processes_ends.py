"""How `octavo serve` ends, and how it starts again: signals, sudden deaths, and weights that cannot be read."""

from __future__ import annotations

import asyncio
import json
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from engines import save_servable
from process_family import title
from served_processes import PATIENCE_S, Client, Served, streams, wait_until

from octavo.actors.runtime.run_dir import default_base

NUM_STREAMS = 12
MAX_TOKENS = 2000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder, max_position_embeddings=8192)
    return folder


def test_f_53_a_second_signal_cuts_the_streams_of_every_edge(model: Path) -> None:
    with Served(model, "--gateways", "2", "--max-model-len", "8192") as server:
        edge = server.serving_edge("edge 1")
        family = server.family()

        def stop_now(_: list[Client]) -> None:
            server.process.terminate()
            wait_until(lambda: "server.draining" in server.log)
            server.process.terminate()

        clients = asyncio.run(streams(server.url, NUM_STREAMS, 8000, stop_now, edges=[server.process, edge]))
        ends = {(client.error, client.finish_reason) for client in clients}
        assert ends == {("server_shutdown", "")}, server.log
        assert server.end() == 0
        assert not any(map(title, family))


def test_f_53_whatever_is_killed_first_nothing_is_left_and_the_next_start_is_clean(model: Path) -> None:
    texts: set[str] = set()
    sockets_before: list[Path] = []
    for victim in ("edge 0", "engine", "executor 0", "nursery", ""):
        with Served(model, "--gateways", "2", "--max-model-len", "4096") as server:
            assert not any(path.exists() for path in sockets_before), "this start has swept what the last one left"
            (client,) = asyncio.run(streams(server.url, 1, 50))
            texts.add(client.text)
            server.serving_edge("edge 1")
            family = server.family()
            assert len(family) == 4  # a nursery, an engine, an executor, an edge
            sockets_before = list(default_base().glob(f"octavo-*/{server.process.pid}-*"))
            assert sockets_before
            if not victim:
                server.popen.terminate()
                assert server.end() == 0
                continue
            shared = {path for process in (server.process, *family) for path in shared_memory(process)}
            if victim != "executor 0":
                server.child("executor 0").suspend()
            if victim != "edge 0":
                server.child(victim).kill()
            server.popen.kill()
            server.end()
            _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
            assert not alive, f"{victim} killed first: not even one that was stopped is left"
            assert not any(path.exists() for path in shared), victim
    assert len(texts) == 1
    assert not any(path.exists() for path in sockets_before), "one that ends well leaves nothing to sweep"


def test_f_10_weights_that_cannot_be_read_are_told_by_ready_and_once_they_can_streams_go_on(tmp_path: Path) -> None:
    save_servable("llama", tmp_path, max_position_embeddings=8192)
    weights = tmp_path / "model.safetensors"
    whole = weights.rename(tmp_path / "whole")
    weights.write_bytes(whole.read_bytes())  # whoever has read this file keeps it; the next one reads another
    with Served(tmp_path, "--gateways", "2", "--max-model-len", "4096") as server:
        server.serving_edge("edge 1")
        expected = [client.text for client in asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS))]
        assert ready(server) == (200, "")

        def disturb(_: list[Client]) -> None:
            weights.unlink()
            weights.write_bytes(b"nothing")
            server.child("executor 0").kill()
            wait_until(lambda: all("could not load" in ready(server)[1] for _ in range(8)))  # whichever edge is asked
            status, why = ready(server)
            assert status == 503 and "safetensors" in why
            weights.unlink()
            whole.rename(weights)

        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb))
        assert [client.text for client in clients] == expected
        wait_until(lambda: ready(server) == (200, ""))


def ready(server: Served) -> tuple[int, str]:
    """What an edge, of which nobody knows which, says to somebody who asks whether it is ready: status and reason."""
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        body = json.loads(response.read())
    finally:
        connection.close()
    return response.status, body["error"]["message"] if "error" in body else ""


def shared_memory(process: psutil.Process) -> set[Path]:
    """What a process has mapped of it, by name."""
    return {Path(region.path) for region in process.memory_maps() if region.path.startswith("/dev/shm/")}
