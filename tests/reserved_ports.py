"""Ports for servers that are started a while after their port was chosen, or twice at the same one."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of this host that nobody else is given meanwhile, and that a server may listen on.

    One that was only free a moment ago may be the local end of some other test's connection by the time the server has
    started. So it stays bound here, without listening, in the way that lets a server bind it as well.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
