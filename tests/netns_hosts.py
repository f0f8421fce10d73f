"""Hosts made of network namespaces: a bridge here, and namespaces with an address each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

PATIENCE_S = 60.0
CONNECT_S = 15.0
"""For a connection on one machine, which needs no process to be scheduled; a firewall that drops it says nothing."""

CONNECT = f"""
import socket, sys
address, port = sys.argv[1:]
socket.create_connection((address, int(port)), timeout=float({CONNECT_S})).close()
"""

LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    sys.stdin.read()
"""


def _ip(*words: str) -> str:
    ended = subprocess.run(["ip", *words], check=True, capture_output=True, timeout=PATIENCE_S, text=True)
    return ended.stdout


@dataclass
class Network:
    """This host at one end of a bridge, others at the other.

    Attributes:
        address: of this host.
        hosts: name of a namespace -> its address.
    """

    address: str
    bridge: str
    hosts: dict[str, str] = field(default_factory=dict)

    def inside(self, host: str) -> list[str]:
        """What to put before a command that runs on a host."""
        return ["ip", "netns", "exec", host]

    def cut(self, host: str) -> None:
        """Nothing that is sent arrives any more, and nobody is told."""
        _ip("link", "set", f"{host}v", "down")

    def heal(self, host: str) -> None:
        _ip("link", "set", f"{host}v", "up")

    def check(self) -> None:
        """Let each host connect to each other and to this one, and this one to each.

        Raises:
            subprocess.SubprocessError, OSError: a connection failed; a firewall may drop what bridges carry.
        """
        places: dict[str, list[str]] = {self.address: []}
        places |= {address: self.inside(host) for host, address in self.hosts.items()}
        for address, inside in places.items():
            listen = [*inside, sys.executable, "-IS", "-c", LISTEN, address]
            with subprocess.Popen(listen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as listener:
                assert listener.stdout is not None
                port = listener.stdout.readline().strip()
                try:
                    for other, from_there in places.items():
                        if other != address:
                            connect = [*from_there, sys.executable, "-IS", "-c", CONNECT, address, port]
                            subprocess.run(connect, check=True, capture_output=True, timeout=PATIENCE_S + CONNECT_S)
                finally:
                    listener.kill()


def why_no_network() -> str:
    """Why there can be no namespaces here whose packets arrive; empty if there can."""
    if shutil.which("ip") is None:
        return "there is no `ip` command"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with network(2) as made:
            try:
                made.check()
            except (subprocess.SubprocessError, OSError) as error:
                words = (getattr(error, "stderr", b"") or repr(error).encode()).decode(errors="replace").strip()
                return f"packets of network namespaces do not arrive (a firewall?): {words.splitlines()[-1]}"
            return ""
    except (subprocess.SubprocessError, OSError) as error:
        return f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error!r}"


@contextlib.contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    """A network of this host and others, gone afterwards."""
    with _subnet_of_our_own() as number:
        tag, subnet = f"octavo{number}", f"198.18.{number}"
        made = Network(f"{subnet}.1", f"{tag}b")
        try:
            _ip("link", "add", made.bridge, "type", "bridge")
            _ip("addr", "add", f"{made.address}/24", "dev", made.bridge)
            _ip("link", "set", made.bridge, "up")
            for index in range(num_hosts):
                host = f"{tag}{'acdefgh'[index]}"
                _ip("netns", "add", host)
                made.hosts[host] = f"{subnet}.{index + 2}"
                _ip("link", "add", f"{host}v", "type", "veth", "peer", "name", "eth0", "netns", host)
                _ip("link", "set", f"{host}v", "master", made.bridge, "up")
                for words in (
                    ("link", "set", "lo", "up"),
                    ("addr", "add", f"{made.hosts[host]}/24", "dev", "eth0"),
                    ("link", "set", "eth0", "up"),
                ):
                    _ip("-n", host, *words)
            yield made
        finally:
            _remove(tag)


@contextlib.contextmanager
def _subnet_of_our_own() -> Iterator[int]:
    """The third number of a subnet of RFC 2544 (which is for tests) that nobody on this machine uses.

    A lock keeps other tests away and goes with this process, however it ends: so whatever is there under the name of a
    subnet that could be locked was left behind by somebody dead, and is removed.
    """
    numbers = list(range(1, 255))
    random.SystemRandom().shuffle(numbers)
    links = [link for _, link in socket.if_nameindex()]
    numbers.sort(key=lambda number: f"octavo{number}b" not in links)
    for number in numbers:  # first those that somebody left behind
        path = Path(tempfile.gettempdir()) / f"octavo-test-subnet-{os.getuid()}-{number}"
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove(f"octavo{number}")
            if not any(IPv4Network(f"198.18.{number}.0/24").overlaps(used) for used in _networks_in_use()):
                yield number
                return
    raise OSError("every subnet of 198.18.0.0/16 is in use")


def _networks_in_use() -> list[IPv4Network]:
    """Those that this host has an address in."""
    links = json.loads(_ip("-json", "-4", "addr"))
    addresses = [address for link in links for address in link.get("addr_info", [])]
    return [IPv4Interface(f"{each['local']}/{each['prefixlen']}").network for each in addresses]


def _remove(tag: str) -> None:
    """Whatever there is of a network, and who runs on its hosts."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line]
    for host in (name for name in names if name[:-1] == tag):
        for pid in _ip("netns", "pids", host).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", host)
    for _, link in socket.if_nameindex():
        if link == f"{tag}b" or (link[:-2] == tag and link[-1] == "v"):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "del", link)
