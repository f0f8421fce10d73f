"""One port for processes of this host and of others."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from port_tools import Pump, cancel

from octavo.actors.runtime.curve import CurveKeys, make_keys
from octavo.actors.runtime.port import Port
from octavo.messages.request import CancelRequest


def test_one_port_listens_by_ipc_without_and_by_tcp_with_keys_and_each_peer_is_heard_by_its_own_way(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o700)
    ours, theirs = make_keys(), make_keys()
    allow_list = tmp_path / "allowed"
    allow_list.write_text(f"{theirs.public} node a\n")
    keys = CurveKeys(ours.public, ours.secret, allow_list)
    edge = Port("edge 0", 7, keys=keys, allowed={"executor": [CancelRequest], "node": [CancelRequest]})
    local = Port("executor 0", 1)
    node = Port("node a", 1, keys=theirs)
    remote = Port("executor 1", 1, keys=theirs)
    impostor = Port("executor 0", 2, keys=theirs)
    ports = (edge, local, node, remote, impostor)
    try:
        by_ipc, by_tcp = edge.bind(f"ipc://{tmp_path}/edge"), edge.bind("tcp://127.0.0.1:0")
        edge.vouch("executor 0", "")
        edge.vouch("executor 1", theirs.public)  # the list has this key for the node alone, but we placed it there
        local.connect("edge 0", 7, by_ipc)
        for number, port in enumerate((node, remote, impostor)):
            port.connect("edge 0", 0, by_tcp, server_key=ours.public.encode())  # whichever incarnation is there
            port.send("edge 0", cancel(number))
        local.send("edge 0", cancel(9))
        pump = Pump(*ports)
        pump.until(lambda: len(pump.received["edge 0"]) == 3 and ("edge 0", "refused") in pump.events["executor 0"])
        assert sorted(peer for peer, _ in pump.received["edge 0"]) == ["executor 0", "executor 1", "node a"]
        assert pump.numbers(edge, "executor 0") == [9]  # not the impostor's
    finally:
        for port in ports:
            port.close()


def test_who_joined_whichever_incarnation_was_there_is_refused_by_the_next(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    endpoint = f"ipc://{tmp_path}/edge"
    node = Port("node a", 1)
    first = Port("edge 0", 7, allowed={"node": [CancelRequest]})
    first.bind(endpoint)
    node.connect("edge 0", 0, endpoint)
    Pump(first, node).until(lambda: node.is_up("edge 0"))
    first.close()
    second = Port("edge 0", 8, allowed={"node": [CancelRequest]})
    try:
        second.bind(endpoint)
        pump = Pump(second, node)
        pump.until(lambda: ("edge 0", "refused") in pump.events["node a"])
        node.send("edge 0", cancel(1))
        assert pump.received["edge 0"] == []
    finally:
        node.close()
        second.close()


def has_ipv6() -> bool:
    """Whether this host has IPv6 on loopback."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


@pytest.mark.parametrize("has_keys", [False, True])
@pytest.mark.parametrize("host", [pytest.param("[::1]", marks=needs_ipv6), "127.0.0.1", "localhost"])
def test_addresses_of_both_kinds_and_names_of_them_are_listened_to_and_called(
    tmp_path: Path, host: str, has_keys: bool
) -> None:
    ours, theirs = (make_keys(), make_keys()) if has_keys else (None, None)
    if ours and theirs:
        (tmp_path / "allowed").write_text(f"{theirs.public} node a\n")
        ours = CurveKeys(ours.public, ours.secret, tmp_path / "allowed")
    edge = Port("edge 0", 1, keys=ours, allowed={"node": [CancelRequest]}, allow_plain_loopback=True)
    node = Port("node a", 1, keys=theirs, allow_plain_loopback=True)
    try:
        endpoint = edge.bind(f"tcp://{host}:0")
        assert endpoint.startswith("tcp://[::1]:" if host == "[::1]" else "tcp://127.0.0.1:")
        called = f"tcp://{host}:{endpoint.rpartition(':')[2]}"
        node.connect("edge 0", 1, called, server_key=ours.public.encode() if ours else b"")
        node.send("edge 0", cancel(1))
        pump = Pump(edge, node)
        pump.until(lambda: pump.numbers(edge) == [1])
    finally:
        edge.close()
        node.close()


@needs_ipv6
@pytest.mark.parametrize("order", [("ipc", "tcp"), ("tcp", "ipc")])
def test_a_port_that_listens_by_ipv6_is_heard_by_ipc_as_well(tmp_path: Path, order: tuple[str, str]) -> None:
    tmp_path.chmod(0o700)
    edge = Port("edge 0", 1, allowed={"node": [CancelRequest]}, allow_plain_loopback=True)
    nodes = [Port(f"node {name}", 1, allow_plain_loopback=True) for name in order]
    try:
        for number, (node, scheme) in enumerate(zip(nodes, order, strict=True)):
            node.connect("edge 0", 1, edge.bind(f"ipc://{tmp_path}/edge" if scheme == "ipc" else "tcp://[::1]:0"))
            node.send("edge 0", cancel(number))
        pump = Pump(edge, *nodes)
        pump.until(lambda: sorted(pump.numbers(edge)) == [0, 1])
    finally:
        for port in (edge, *nodes):
            port.close()
