"""Where the processes of one engine listen.

On one host a name and an incarnation say it, so nobody has to be told. On several, who listens says where.
"""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import msgspec

from ...messages.errors import InvalidConfigError
from .curve import CurveKeys, read_keys

EDGE = "edge 0"
"""Who supervises the others. If that process dies while other edges have clients, one of them takes its place, under
the same name and the next incarnation, until they have finished."""

EDGE_INCARNATION = 1
"""Of an engine on one host. One of several hosts has another in each run, so that nobody mistakes it for the last."""

ENGINE = "engine"
"""Role of the engine processes: their names begin with it."""


def endpoint_of(run_dir: str, name: str, incarnation: int) -> str:
    """The `ipc://` endpoint of one start of a process; no two starts share one."""
    return f"ipc://{run_dir}/{name.replace(' ', '-')}.{incarnation}"


def mark_of(run_dir: str, name: str, incarnation: int) -> Path:
    """Where one start of a process notes who it is (`process_mark`), beside its endpoint."""
    return Path(endpoint_of(run_dir, name, incarnation).removeprefix("ipc://") + ".pid")


def remove_socket(run_dir: str, name: str, incarnation: int) -> None:
    """Remove what a process that was killed has left of its endpoint and its mark, if it has."""
    Path(endpoint_of(run_dir, name, incarnation).removeprefix("ipc://")).unlink(missing_ok=True)
    mark_of(run_dir, name, incarnation).unlink(missing_ok=True)


def edges_listening(run_dir: str) -> dict[str, int]:
    """Names and latest incarnations of the further edges whose sockets are there.

    One that has closed has removed its own; that of one that was killed may be left.
    """
    found: dict[str, int] = {}
    for path in sorted(Path(run_dir).glob("edge-*.*")):
        number, _, incarnation = path.name.removeprefix("edge-").partition(".")
        if number.isdecimal() and incarnation.isdecimal() and (name := f"edge {number}") != EDGE:
            found[name] = max(found.get(name, 0), int(incarnation))
    return found


class TcpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a process listens to other hosts.

    Attributes:
        host: address to bind; the port is a free one.
        keys: path of the key file; empty: no keys, on loopback alone.
        allow_list: path of the file of peers' public keys.
    """

    host: str
    keys: str = ""
    allow_list: str = ""

    @property
    def endpoint(self) -> str:
        return f"tcp://{in_brackets(self.host)}:0"

    def read_keys(self) -> CurveKeys | None:
        """The key pair; None without keys.

        Raises:
            InvalidConfigError: the key file is not there, not private, or holds no pair.
        """
        if not self.keys:
            return None
        return read_keys(Path(self.keys), allow_list=Path(self.allow_list) if self.allow_list else None)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host (without brackets) and port of a `tcp://` endpoint.

    Raises:
        InvalidConfigError: it is none.
    """
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535 or any(c in "/@, " for c in host):
        raise InvalidConfigError(f"{endpoint!r} is no endpoint such as tcp://10.0.0.1:7000", field="endpoint")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_everywhere(host: str) -> bool:
    """Whether a host binds every interface, and so names none that others could call."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == "*"


def as_called_from(endpoint: str, known: str) -> str:
    """An endpoint for somebody who reaches its host by the endpoint `known`: of use if it names no interface."""
    host, port = split_endpoint(endpoint)
    if not is_everywhere(host):
        return endpoint
    return f"tcp://{in_brackets(split_endpoint(known)[0])}:{port}"


def address_towards(endpoint: str) -> str:
    """This host's address on the way to an endpoint; nothing is sent.

    Raises:
        OSError: there is no way.
    """
    host, port = split_endpoint(endpoint)
    family, kind, protocol, _, address = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def in_brackets(host: str) -> str:
    """A host as it stands in an endpoint: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
