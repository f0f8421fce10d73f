"""Hosts made of network namespaces: a bridge here, and namespaces with an address each."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


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


def why_no_network() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if shutil.which("ip") is None:
        return "there is no `ip` command"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with network(1):
            return ""
    except (subprocess.SubprocessError, OSError) as error:
        return f"network namespaces cannot be made here: {getattr(error, 'stderr', b'') or error!r}"


@contextlib.contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    """A network of this host and others, gone afterwards."""
    tag = f"oc{os.getpid() % 100000}"
    subnet = f"198.18.{random.SystemRandom().randrange(1, 255)}"  # of RFC 2544, for tests
    made = Network(f"{subnet}.1", f"{tag}b")
    try:
        _ip("link", "add", made.bridge, "type", "bridge")
        _ip("addr", "add", f"{made.address}/24", "dev", made.bridge)
        _ip("link", "set", made.bridge, "up")
        for number in range(num_hosts):
            host = f"{tag}{chr(97 + number)}"
            _ip("netns", "add", host)
            made.hosts[host] = f"{subnet}.{number + 2}"
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
        for host in made.hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, timeout=10, check=False)
            subprocess.run(["ip", "link", "del", f"{host}v"], capture_output=True, timeout=10, check=False)
        subprocess.run(["ip", "link", "del", made.bridge], capture_output=True, timeout=10, check=False)
