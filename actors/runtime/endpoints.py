"""Where a port may listen: private directories, and TCP with keys."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
import sys
from pathlib import Path

from ...messages.errors import InvalidConfigError
from .addresses import in_brackets

MAX_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""What `sockaddr_un.sun_path` holds, less the zero at its end."""


def check_endpoint(endpoint: str, *, has_keys: bool, allow_plain_loopback: bool) -> None:
    """Refuse an endpoint that anybody could reach.

    Raises:
        InvalidConfigError: neither `ipc://` nor `tcp://`; an abstract ipc name (it has no file mode); or TCP without
            keys, unless it is loopback and that was asked for.
    """
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc":
        if not address.startswith("/"):
            raise InvalidConfigError(f"{endpoint!r}: an ipc endpoint is an absolute path", field="endpoint")
        if len(os.fsencode(address)) > MAX_PATH_BYTES:
            raise InvalidConfigError(
                f"{endpoint!r}: longer than the {MAX_PATH_BYTES} bytes of a Unix socket's path; choose a shorter "
                "directory",
                field="endpoint",
            )
        return
    if scheme != "tcp":
        raise InvalidConfigError(f"{endpoint!r}: an endpoint begins with ipc:// or tcp://", field="endpoint")
    if has_keys:
        return
    if not _is_loopback(address.rpartition(":")[0]):
        raise InvalidConfigError(
            f"{endpoint!r} can be reached by other hosts: give it CURVE keys (`octavo keys` makes them)",
            field="endpoint",
        )
    if not allow_plain_loopback:
        raise InvalidConfigError(
            f"{endpoint!r} without CURVE keys can be reached by every user of this host: use ipc://, give it keys "
            "(`octavo keys` makes them), or ask for plain loopback",
            field="endpoint",
        )


def resolved(endpoint: str) -> str:
    """An endpoint to bind, with an address for a name: ZeroMQ binds addresses and interfaces.

    Raises:
        InvalidConfigError: the name is not known.
    """
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if scheme != "tcp" or host == "*" or host in {name for _, name in socket.if_nameindex()}:
        return endpoint
    try:
        numeric = numeric_host(host)
    except OSError as error:
        raise InvalidConfigError(
            f"{endpoint!r}: {host!r} is no address, and no name that this host knows ({error.strerror}): give the "
            "address of one of its interfaces",
            field="endpoint",
        ) from error
    return f"tcp://{in_brackets(numeric)}:{port}"


def listen_error(endpoint: str, code: int, why: str) -> InvalidConfigError | OSError:
    """What to raise where an endpoint could not be bound, by the system's error code."""
    if code in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENODEV):
        return InvalidConfigError(
            f"cannot listen on {endpoint}: this host has no such address, give one of its own", field="endpoint"
        )
    return OSError(code, f"cannot listen on {endpoint}: {why}")


def numeric_host(host: str) -> str:
    """The address that a name stands for, of IPv4 if it has one, as ZeroMQ takes it that connects to a name.

    Raises:
        OSError: it is not known.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    return str(min(found, key=lambda each: each[0] != socket.AF_INET)[4][0])


def is_ipv6(endpoint: str) -> bool:
    """Whether an endpoint needs IPv6: its address is one, or it is a name that has no other.

    A name is not known, too, while nobody has told of it yet; ZeroMQ asks again whenever it connects.
    """
    scheme, _, address = endpoint.partition("://")
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if scheme != "tcp" or not host or host == "*":
        return False
    try:
        return ":" in numeric_host(host)
    except OSError:
        return False


def claim_ipc_path(path: Path) -> None:
    """Make sure that a socket can be bound at `path` without handing it to another user or taking somebody's.

    A socket that nobody listens on any more is removed.

    Raises:
        InvalidConfigError: the directory is not ours alone (mode 0700), or something else is at the path already.
    """
    folder = path.parent
    try:
        status = folder.lstat()
    except FileNotFoundError as error:
        raise InvalidConfigError(f"{folder} does not exist: make it with mode 0700", field="endpoint") from error
    if not stat.S_ISDIR(status.st_mode):
        raise InvalidConfigError(f"{folder} is no directory", field="endpoint")
    if status.st_uid != os.geteuid():
        raise InvalidConfigError(f"{folder} belongs to another user (uid {status.st_uid})", field="endpoint")
    if status.st_mode & 0o077:
        raise InvalidConfigError(
            f"{folder} is open to others (mode {stat.S_IMODE(status.st_mode):04o}): chmod 0700 it", field="endpoint"
        )
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise InvalidConfigError(f"{path} exists and is no socket: remove it, or choose another", field="endpoint")
    if status.st_uid != os.geteuid():
        raise InvalidConfigError(f"{path} is a socket of another user (uid {status.st_uid})", field="endpoint")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(os.fspath(path))
    if code != errno.ECONNREFUSED:  # EAGAIN: somebody listens, with a full backlog
        raise InvalidConfigError(f"{path} is in use by a living process", field="endpoint")
    path.unlink()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # "*", an interface, a name: not certainly loopback
        return False
