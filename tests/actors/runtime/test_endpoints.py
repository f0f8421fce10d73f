"""Where a port may listen."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from port_tools import open_port

from octavo.actors.runtime import endpoints
from octavo.actors.runtime.endpoints import check_endpoint, claim_ipc_path
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
