"""Where a port may listen."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from port_tools import open_port

from octavo.actors.runtime import endpoints
from octavo.actors.runtime.endpoints import check_endpoint, claim_ipc_path, is_ipv6, resolved
from octavo.messages.errors import InvalidConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_hi_122_a_file_at_the_path_is_refused_and_left_alone(folder: Path) -> None:
    path = folder / "engine"
    path.write_text("mine")
    port = open_port()
    with pytest.raises(InvalidConfigError, match="no socket"):
        port.bind(f"ipc://{path}")
    port.close()
    assert path.read_text() == "mine"


def test_hi_122_a_symlink_at_the_path_is_refused(folder: Path) -> None:
    path = folder / "engine"
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(InvalidConfigError, match="no socket"):
        claim_ipc_path(path)
    assert path.is_symlink()


def test_hi_122_a_directory_open_to_others_is_refused(folder: Path) -> None:
    folder.chmod(0o750)
    with pytest.raises(InvalidConfigError, match="chmod 0700"):
        claim_ipc_path(folder / "engine")


def test_hi_122_a_linked_directory_is_refused(folder: Path) -> None:
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(InvalidConfigError, match="no directory"):
        claim_ipc_path(folder / "link" / "engine")


def test_hi_122_a_missing_directory_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidConfigError, match="0700"):
        claim_ipc_path(folder / "no" / "engine")


def test_hi_122_another_users_directory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InvalidConfigError, match="another user"):
        claim_ipc_path(folder / "engine")


def test_hi_122_the_socket_of_a_dead_process_is_replaced(folder: Path) -> None:
    path = folder / "engine"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(os.fspath(path))
    dead.listen()
    dead.close()  # the path stays behind, as after a kill
    port = open_port()
    port.bind(f"ipc://{path}")
    port.close()


def test_hi_122_the_socket_of_a_living_process_is_not_taken(folder: Path) -> None:
    first, second = open_port(), open_port()
    endpoint = first.bind(f"ipc://{folder}/engine")
    with pytest.raises(InvalidConfigError, match="in use"):
        second.bind(endpoint)
    second.close()
    assert (folder / "engine").is_socket()
    first.close()


@pytest.mark.parametrize(
    "endpoint",
    ["ipc://relative", "ipc://@abstract", "inproc://x", "udp://1.2.3.4:5", "engine", "ipc:///" + "x" * 120],
)
def test_other_endpoints_than_paths_and_tcp_are_refused(endpoint: str) -> None:
    with pytest.raises(InvalidConfigError):
        check_endpoint(endpoint, has_keys=True, allow_plain_loopback=True)


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "192.168.1.5", "example.org", "[::]", "eth0"])
def test_tcp_without_keys_is_refused_beyond_loopback_even_if_plain_loopback_is_asked_for(host: str) -> None:
    with pytest.raises(InvalidConfigError, match="octavo keys"):
        check_endpoint(f"tcp://{host}:5555", has_keys=False, allow_plain_loopback=True)
    check_endpoint(f"tcp://{host}:5555", has_keys=True, allow_plain_loopback=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_tcp_without_keys_on_loopback_needs_to_be_asked_for(host: str) -> None:
    with pytest.raises(InvalidConfigError, match="plain loopback"):
        check_endpoint(f"tcp://{host}:5555", has_keys=False, allow_plain_loopback=False)
    check_endpoint(f"tcp://{host}:5555", has_keys=False, allow_plain_loopback=True)


def test_an_address_in_use_is_an_operating_system_error_that_names_it() -> None:
    from octavo.actors.runtime.port import Port

    first, second = (Port(name, 1, allow_plain_loopback=True) for name in ("a", "b"))
    try:
        endpoint = first.bind("tcp://127.0.0.1:*")
        assert not endpoint.endswith("*")
        with pytest.raises(OSError, match=endpoint):
            second.bind(endpoint)
    finally:
        first.close()
        second.close()


def knows(monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> None:
    """Let the host know these names, and no others."""

    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in names[host]]
        return [(family, 1, 6, "", (address, 0)) for family, address in zip(families, names[host], strict=True)]

    monkeypatch.setattr(endpoints.socket, "getaddrinfo", getaddrinfo)


def test_a_name_is_bound_by_its_address_of_ipv4_if_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    knows(monkeypatch, both=["fd00::1", "10.0.0.1"], new=["fd00::1"])
    assert resolved("tcp://both:7000") == "tcp://10.0.0.1:7000"
    assert resolved("tcp://new:7000") == "tcp://[fd00::1]:7000"
    assert [is_ipv6(f"tcp://{name}:7000") for name in ("both", "new", "unknown")] == [False, True, False]
    for kept in ("tcp://10.1.1.1:0", "tcp://*:7000", "tcp://lo:7000", "tcp://[::1]:*", "ipc:///run/x"):
        assert resolved(kept) == kept
    assert is_ipv6("tcp://[::1]:7000") and not is_ipv6("tcp://*:7000") and not is_ipv6("ipc:///run/x")


def test_a_name_that_nobody_knows_is_refused_with_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    knows(monkeypatch)
    with pytest.raises(InvalidConfigError, match="'octavo-host' is no address, and no name that this host knows"):
        resolved("tcp://octavo-host:7000")
    monkeypatch.undo()
    with pytest.raises(InvalidConfigError, match="no address"):
        resolved(f"tcp://{'x' * 70}.example:7000")  # no label of a name is as long


def test_a_name_that_is_not_what_it_says_is_not_bound_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.actors.runtime.port import Port

    knows(monkeypatch, localhost=["10.0.0.1"])
    port = Port("a", 1, allow_plain_loopback=True)
    try:
        with pytest.raises(InvalidConfigError, match=r"tcp://10\.0\.0\.1:0' can be reached by other hosts"):
            port.bind("tcp://localhost:0")
    finally:
        port.close()


def test_an_address_of_another_host_is_refused_with_what_to_give() -> None:
    from octavo.actors.runtime.curve import make_keys
    from octavo.actors.runtime.port import Port

    port = Port("a", 1, keys=make_keys())
    try:
        for host in ("192.0.2.1", "[2001:db8::1]"):
            with pytest.raises(InvalidConfigError, match="this host has no such address, give one of its own"):
                port.bind(f"tcp://{host}:0")
    finally:
        port.close()
