"""SEC-11: who listens where, in a family of processes that serves."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import psutil
from engines import save_servable
from process_family import title
from served_processes import Served


def test_sec_11_a_family_listens_where_it_says_and_nowhere_else(tmp_path: Path) -> None:
    save_servable("llama", tmp_path)
    with Served(tmp_path, "--gateways", "2", "--tensor-parallel-size", "2") as server:
        announced = urlsplit(server.url).port
        server.serving_edge("edge 1")  # which may come up after the first
        family = [server.process, *server.process.children(recursive=True)]
        assert len(family) == 6, [process.name() for process in family]
        listening = {
            (title(process), connection.laddr.ip, connection.laddr.port)
            for process in family
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {ip for _, ip, _ in listening} == {"127.0.0.1"}, "nothing but loopback was asked for"
        # The ranks of a group meet by TCP, on this host alone; everybody else talks by paths in a folder of its own.
        strangers = {(name, port) for name, _, port in listening if not name.startswith("octavo: executor ")}
        assert {port for _, port in strangers} == {announced}, strangers
        assert all(name.startswith("octavo: edge ") for name, _ in strangers), strangers
