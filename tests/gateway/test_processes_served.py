"""`octavo serve --gateways 2` with real processes: faults of edges and under edges, drain, sudden ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest
from engines import save_servable
from served_processes import Client, Served, streams, title, wait_until

from octavo.actors.runtime.run_dir import default_base

NUM_STREAMS = 12
MAX_TOKENS = 2000  # so many that none is over before all have begun, on a busy machine, too


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder, max_position_embeddings=8192)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with Served(model, "--gateways", "2", "--max-model-len", "4096") as server:
        server.serving_edge("edge 1")
        yield server


@pytest.fixture(scope="module")
def expected(server: Served) -> list[str]:
    """What each stream says when nothing happens."""
    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS))
    assert {client.finish_reason for client in clients} == {"length"}
    return [client.text for client in clients]


def of_edge(clients: list[Client], edge: psutil.Process) -> list[Client]:
    found = [client for client in clients if client.is_served_by(edge)]
    assert 0 < len(found) < len(clients), "the system gave all connections to one edge"
    return found


async def metric(url: str, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize(
    ("victim", "number"),
    [("engine", signal.SIGKILL), ("executor 0", signal.SIGKILL), ("engine", signal.SIGSTOP)],
    ids=["engine killed", "executor killed", "engine stopped"],
)
def test_streams_of_every_edge_survive_what_is_under_them(
    server: Served, expected: list[str], victim: str, number: signal.Signals
) -> None:
    before = server.child(victim)

    def disturb(clients: list[Client]) -> None:
        of_edge(clients, server.child("edge 1"))
        before.send_signal(number)

    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb))
    assert [client.text for client in clients] == expected
    assert server.child(victim).pid != before.pid


def test_f_23_an_edge_that_dies_takes_its_own_streams_along_and_no_others(server: Served, expected: list[str]) -> None:
    edge = server.serving_edge("edge 1")
    lost: list[Client] = []

    def disturb(clients: list[Client]) -> None:
        lost.extend(of_edge(clients, edge))
        edge.kill()

    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb))
    for client in clients:
        if client in lost:
            assert client.error == "reset" and not client.finish_reason
        else:
            assert client.text == expected[client.index]
    server.serving_edge("edge 1", other_than=edge.pid)
    wait_until(lambda: asyncio.run(metric(server.url, "vllm:num_requests_running")) == 0)
    again = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS))
    assert [client.text for client in again] == expected


def test_an_edge_that_hangs_is_replaced(server: Served, expected: list[str]) -> None:
    edge = server.serving_edge("edge 1")
    edge.suspend()
    server.serving_edge("edge 1", other_than=edge.pid)
    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS))
    assert [client.text for client in clients] == expected


def test_f_48_edge_0_stands_still_and_kills_nobody_for_the_silence(server: Served, expected: list[str]) -> None:
    before = {process.pid for process in server.family()}

    def disturb(clients: list[Client]) -> None:
        server.process.suspend()
        asyncio.get_running_loop().call_later(4.0, server.process.resume)

    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb))
    assert [client.text for client in clients] == expected
    assert {process.pid for process in server.family()} == before


def test_f_49_without_file_descriptors_open_streams_go_on_and_later_ones_are_accepted_again(
    server: Served, expected: list[str]
) -> None:
    edges = [server.process, server.serving_edge("edge 1")]
    limits = [edge.rlimit(psutil.RLIMIT_NOFILE) for edge in edges]
    address = (urlsplit(server.url).hostname, urlsplit(server.url).port)
    waiting: list[socket.socket] = []

    began_s = time.monotonic()

    def disturb(_: list[Client]) -> None:
        for edge, (_soft, hard) in zip(edges, limits, strict=True):
            edge.rlimit(psutil.RLIMIT_NOFILE, (edge.num_fds(), hard))
        waiting.extend(socket.create_connection(address) for _ in range(16))

    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb))
    assert [client.text for client in clients] == expected
    for edge, limit in zip(edges, limits, strict=True):
        edge.rlimit(psutil.RLIMIT_NOFILE, limit)
    most = 1000 * (2 + time.monotonic() - began_s)  # a second's pause between tries of 16 that say so a few times each
    for connection in waiting:
        connection.close()
    again = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS))
    assert [client.text for client in again] == expected
    assert all(edge.is_running() for edge in edges)
    assert 0 < server.log.count("out of system resource") < most, "it pauses between its tries"


def test_f_52_open_streams_of_every_edge_end_well_when_the_server_is_told_to_stop(
    server: Served, expected: list[str]
) -> None:
    """The last of those that share a server."""
    edge = server.serving_edge("edge 1")
    family = server.family()

    def stop(clients: list[Client]) -> None:
        of_edge(clients, edge)
        server.process.terminate()

    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, stop))
    assert [client.text for client in clients] == expected
    assert server.end() == 0
    assert not any(process.is_running() for process in family)


def test_f_53_a_second_signal_cuts_the_streams_of_every_edge(model: Path) -> None:
    with Served(model, "--gateways", "2", "--max-model-len", "8192") as server:
        edge = server.serving_edge("edge 1")
        family = server.family()

        def stop_now(clients: list[Client]) -> None:
            of_edge(clients, edge)
            server.process.terminate()
            wait_until(lambda: "server.draining" in server.log)
            server.process.terminate()

        clients = asyncio.run(streams(server.url, NUM_STREAMS, 8000, stop_now))
        ends = {(client.error, client.finish_reason) for client in clients}
        assert ends == {("server_shutdown", "")}, server.log
        assert server.end() == 0
        assert not any(process.is_running() for process in family)


def test_f_53_whatever_is_killed_first_nothing_is_left(model: Path) -> None:
    with Served(model, "--gateways", "2", "--max-model-len", "4096") as server:
        server.serving_edge("edge 1")
        family = server.family()
        assert len(family) == 4  # a nursery, an engine, an executor, an edge
        server.child("executor 0").suspend()
        server.popen.kill()
        server.end()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, "not even one that was stopped"


@pytest.mark.parametrize("then", ["", "executor 0", "engine"], ids=["alone", "then the executor", "then the engine"])
def test_when_edge_0_dies_streams_of_other_edges_go_on_and_the_server_ends_with_them(
    model: Path, expected: list[str], then: str
) -> None:
    with Served(model, "--gateways", "3", "--max-model-len", "4096") as server:
        edges = [server.serving_edge(f"edge {number}") for number in (1, 2)]
        family = server.family()
        lost: list[Client] = []

        killed: list[psutil.Process] = []

        def kill_another() -> None:
            wait_until(lambda: bool(killed) or kill(f"octavo: {then}", edges, killed))

        killer = threading.Thread(target=kill_another)

        def disturb(clients: list[Client]) -> None:
            lost.extend(of_edge(clients, server.process))
            server.popen.kill()
            server.popen.wait()
            if then:
                killer.start()

        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb))
        if then:
            killer.join()
            assert killed, "there were streams for a new one to serve"
        for client in clients:
            if client in lost:
                assert client.error == "reset" and not client.finish_reason
            else:
                assert (client.error, client.text) == ("", expected[client.index]), server.log
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, "with the last stream the server ends"
        assert not list(default_base().glob(f"octavo-*/{server.process.pid}-*")), "and leaves no socket"


def test_edges_that_have_lost_edge_0_end_at_once_when_they_are_told_to(model: Path) -> None:
    with Served(model, "--gateways", "2", "--max-model-len", "8192") as server:
        edge = server.serving_edge("edge 1")
        family = server.family()

        def stop_now(clients: list[Client]) -> None:
            of_edge(clients, edge)
            server.popen.kill()
            server.popen.wait()
            wait_until(lambda: "supervision.taken_over" in server.log)
            edge.terminate()

        clients = asyncio.run(streams(server.url, NUM_STREAMS, 8000, stop_now))
        ends = {(client.error, client.finish_reason) for client in clients}
        assert ends == {("reset", ""), ("server_shutdown", "")}, server.log
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive


def kill(name: str, ancestors: list[psutil.Process], killed: list[psutil.Process]) -> bool:
    """Kill a descendant with that title; False if there is none at the moment."""
    for ancestor in ancestors:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in ancestor.children(recursive=True):
                if title(process) == name:
                    process.kill()
                    killed.append(process)
                    return True
    return False
