"""Finds the processes of the server behind a URL, by the tree that its listening process belongs to.

Nothing of this goes through the server, which tells nobody its process ids: the kernel knows who listens on the port
(`/proc/net/tcp` and `/proc/*/fd`, read by psutil), and process titles say who is who. So it works on the server's own
host, in its network namespace, for its own user or root.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

import psutil

from ...messages.errors import OctavoError

TITLE_PREFIX = "octavo: "
_TITLE = re.compile(r"octavo: (?P<actor>[a-z_]+)(?: (?P<index>\d+))?")


class ProcessNotFoundError(OctavoError):
    """No such process can be reached from here; the message says what to do."""

    code = "process_not_found"


def title_of(process: psutil.Process) -> str:
    """What `ps` shows for a process; empty if it is gone or a zombie."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


class ServerProcesses:
    """The processes of one server, looked up anew at each question, as they come and go.

    Args:
        root: the outermost process of the server; all others descend from it.
    """

    def __init__(self, root: psutil.Process) -> None:
        self.root = root

    @classmethod
    def behind(cls, url: str) -> ServerProcesses:
        """The server that listens at this URL.

        Raises:
            ProcessNotFoundError: it does not run on this host, or belongs to another user.
        """
        address = urlsplit(url)
        port = address.port or (443 if address.scheme == "https" else 80)
        if not _is_local(address.hostname or ""):
            raise ProcessNotFoundError(
                f"{address.hostname} is not this host: signals reach only processes here, so run this command beside "
                "the server"
            )
        pids = sorted(
            {
                connection.pid
                for connection in psutil.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid
            }
        )
        if not pids:
            raise ProcessNotFoundError(
                f"no process that listens on port {port} can be seen here: is it another user's, or in another network "
                "namespace or container? Run this command there"
            )
        return cls(_outermost(psutil.Process(pids[0])))

    def doing(self, actor: str) -> list[psutil.Process]:
        """Living processes titled `octavo: ACTOR` or `octavo: ACTOR N`, by title."""
        try:
            family = [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        found = []
        for process in family:
            title = title_of(process)
            match = _TITLE.fullmatch(title)
            if match is not None and match["actor"] == actor:
                found.append((title, process.pid, process))
        return [process for _, _, process in sorted(found, key=lambda entry: entry[:2])]


def _outermost(process: psutil.Process) -> psutil.Process:
    """Go up while parents are octavo's too: listeners may be children of the process that started them.

    Not as far as this process, though it be a parent: a program that looks for a server is none of its processes.
    """
    while True:
        try:
            parent = process.parent()
        except psutil.Error:
            return process
        if parent is None or parent.pid == os.getpid() or not title_of(parent).startswith(TITLE_PREFIX):
            return process
        process = parent


def _is_local(host: str) -> bool:
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    ours = {address.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for address in entries}
    return any(ipaddress.ip_address(str(address)).is_loopback or address in ours for address in addresses)
