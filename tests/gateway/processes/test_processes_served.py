"""`octavo serve --gateways 2` with real processes: faults of edges and under edges, drain, sudden ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest
from engines import save_servable
from process_family import title
from served_processes import PATIENCE_S, Client, Served, of_edge, streams, wait_until

from octavo.actors.runtime.run_dir import default_base

NUM_STREAMS = 12
NUM_IDLE = 2000
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


def check_lost(lost: list[Client], expected: list[str]) -> None:
    """Streams of an edge that died are cut, but for one whose last token was on its way."""
    assert any(client.error == "reset" for client in lost)
    for client in lost:
        if client.error:
            assert client.error == "reset" and not client.finish_reason
        else:
            assert client.text == expected[client.index]


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
    edges = [server.process, server.serving_edge("edge 1")]

    def disturb(_: list[Client]) -> None:
        before.send_signal(number)

    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb, edges=edges))
    assert [client.text for client in clients] == expected
    server.child(victim, other_than=before.pid)


def test_f_23_an_edge_that_dies_takes_its_own_streams_along_and_no_others(server: Served, expected: list[str]) -> None:
    edge = server.serving_edge("edge 1")
    lost: list[Client] = []

    def disturb(clients: list[Client]) -> None:
        lost.extend(of_edge(clients, edge))
        edge.kill()

    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb, edges=[server.process, edge]))
    check_lost(lost, expected)
    for client in clients:
        assert client in lost or client.text == expected[client.index]
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

    edges = [server.process, server.serving_edge("edge 1")]

    def disturb(_: list[Client]) -> None:
        server.process.suspend()
        asyncio.get_running_loop().call_later(4.0, server.process.resume)

    try:
        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb, edges=edges))
    finally:
        server.process.resume()
    assert [client.text for client in clients] == expected
    assert {process.pid for process in server.family()} == before


def test_f_48_a_host_that_stands_still_with_all_processes_on_it_costs_nothing(
    server: Served, expected: list[str]
) -> None:
    everybody = [server.process, *server.family()]
    assert len(everybody) == 5  # a nursery, an engine, an executor, two edges

    def resume() -> None:
        for process in reversed(everybody):  # the supervisor last: it would find the others stopped
            with contextlib.suppress(psutil.NoSuchProcess):  # is told below
                process.resume()

    def disturb(_: list[Client]) -> None:
        for process in everybody:
            process.suspend()
        asyncio.get_running_loop().call_later(4.0, resume)

    edges = [server.process, server.serving_edge("edge 1")]
    try:
        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb, edges=edges))
    finally:
        resume()
    assert [client.text for client in clients] == expected
    assert [server.process, *server.family()] == everybody


def test_f_55_two_thousand_clients_that_ask_nothing_more_cost_no_stream(server: Served, expected: list[str]) -> None:
    edges = [server.process, server.serving_edge("edge 1")]
    num_connected: list[int] = []

    def look(_: list[Client]) -> None:
        num_connected.extend(len([one for one in edge.net_connections("tcp") if one.raddr]) for edge in edges)

    with contextlib.ExitStack() as idle:
        for _ in range(NUM_IDLE):
            client = HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE_S)
            idle.callback(client.close)
            client.request("GET", "/live")
            response = client.getresponse()
            assert (response.status, bool(response.read())) == (200, True)
        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, look, edges=edges))
    assert sum(num_connected) >= NUM_IDLE + NUM_STREAMS, "none was sent away"
    assert [client.text for client in clients] == expected


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
            edge.rlimit(psutil.RLIMIT_NOFILE, (lowest_unused_descriptor(edge), hard))
        waiting.extend(socket.create_connection(address) for _ in range(16))

    try:
        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb))
        wait_until(lambda: "out of system resource" in server.log)  # streams may have been quicker
    finally:
        for edge, limit in zip(edges, limits, strict=True):
            edge.rlimit(psutil.RLIMIT_NOFILE, limit)
    assert [client.text for client in clients] == expected
    most = 1000 * (2 + time.monotonic() - began_s)  # a second's pause between tries of 16 that say so a few times each
    for connection in waiting:
        connection.close()
    again = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS))
    assert [client.text for client in again] == expected
    assert all(edge.is_running() for edge in edges)
    assert server.log.count("out of system resource") < most, "it pauses between its tries"


def test_f_52_open_streams_of_every_edge_end_well_when_the_server_is_told_to_stop(
    server: Served, expected: list[str]
) -> None:
    """The last of those that share a server. `octavo bench drain` tries it with 500 streams."""
    edge = server.serving_edge("edge 1")
    family = server.family()

    def stop(_: list[Client]) -> None:
        server.process.terminate()

    clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, stop, edges=[server.process, edge]))
    assert [client.text for client in clients] == expected
    assert server.end() == 0
    assert not any(map(title, family))


@pytest.mark.parametrize(
    ("then", "flags"),
    [
        ("", ()),
        ("executor 0", ()),
        ("engine", ()),
        ("", ("--tensor-parallel-size", "2")),
        ("", ("--data-parallel-size", "2")),
    ],
    ids=["alone", "then the executor", "then the engine", "with two ranks", "with two replicas"],
)
def test_when_edge_0_dies_streams_of_other_edges_go_on_and_the_server_ends_with_them(
    model: Path, expected: list[str], then: str, flags: tuple[str, ...]
) -> None:
    with Served(model, "--gateways", "3", "--max-model-len", "4096", *flags) as server:
        edges = [server.serving_edge(f"edge {number}") for number in (1, 2)]
        family = server.family()
        if "--tensor-parallel-size" in flags:  # ranks sum in an order of their own: the last bits are others
            expected = [client.text for client in asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS))]
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

        everybody = [server.process, *edges]
        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb, edges=everybody))
        if then:
            killer.join()
            assert killed, "there were streams for a new one to serve"
        check_lost(lost, expected)
        for client in clients:
            if client not in lost:
                assert (client.error, client.text) == ("", expected[client.index]), server.log
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not alive, "with the last stream the server ends"
        assert not list(default_base().glob(f"octavo-*/{server.process.pid}-*")), "and leaves no socket"


def test_an_edge_that_is_stopped_after_edge_0_died_is_not_left_behind(model: Path, expected: list[str]) -> None:
    with Served(model, "--gateways", "3", "--max-model-len", "4096") as server:
        edges = [server.serving_edge(f"edge {number}") for number in (1, 2)]
        family = server.family()
        lost: list[Client] = []

        def disturb(clients: list[Client]) -> None:
            server.popen.kill()
            server.popen.wait()
            wait_until(lambda: '"supervision.taken_over"' in server.log)
            (news,) = [line for line in server.log.splitlines() if '"supervision.taken_over"' in line]
            stopped, heir = sorted(edges, key=lambda edge: title(edge).removeprefix("octavo: ") in news)
            lost.extend(client for client in clients if client not in of_edge(clients, heir))
            stopped.suspend()

        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb, edges=[server.process, *edges]))
        for client in clients:
            if client not in lost:
                assert (client.error, client.text) == ("", expected[client.index]), server.log
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not alive
        assert "edge.killed" in server.log


def test_f_07_edge_0_is_ended_if_it_is_stopped_when_an_executor_dies_and_streams_of_others_go_on(
    model: Path, expected: list[str]
) -> None:
    with Served(model, "--gateways", "2", "--max-model-len", "4096") as server:
        edge = server.serving_edge("edge 1")
        executor = server.child("executor 0")
        family = server.family()
        lost: list[Client] = []

        def disturb(clients: list[Client]) -> None:
            lost.extend(of_edge(clients, server.process))
            server.process.suspend()
            executor.kill()

        clients = asyncio.run(streams(server.url, NUM_STREAMS, MAX_TOKENS, disturb, edges=[server.process, edge]))
        check_lost(lost, expected)
        for client in clients:
            if client not in lost:
                assert (client.error, client.text) == ("", expected[client.index]), server.log
        wait_until(lambda: "supervision.fenced" in server.log)
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not alive


def test_edges_that_have_lost_edge_0_end_at_once_when_they_are_told_to(model: Path) -> None:
    with Served(model, "--gateways", "2", "--max-model-len", "8192") as server:
        edge = server.serving_edge("edge 1")
        family = server.family()

        def stop_now(_: list[Client]) -> None:
            server.popen.kill()
            server.popen.wait()
            wait_until(lambda: "supervision.taken_over" in server.log)
            edge.terminate()

        clients = asyncio.run(streams(server.url, NUM_STREAMS, 8000, stop_now, edges=[server.process, edge]))
        ends = {(client.error, client.finish_reason) for client in clients}
        assert ends == {("reset", ""), ("server_shutdown", "")}, server.log
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not alive


def lowest_unused_descriptor(process: psutil.Process) -> int:
    """What a process would be given next: with this as its limit, nothing."""
    used = {int(path.name) for path in Path(f"/proc/{process.pid}/fd").iterdir()}
    return next(number for number in itertools.count() if number not in used)


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
