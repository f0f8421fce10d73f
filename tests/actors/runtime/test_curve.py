"""Keys: files, allow-lists, and who gets through to a port on TCP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from port_tools import Pump, RawPeer, cancel

from octavo.actors.runtime.curve import (
    AllowList,
    CurveKeys,
    make_keys,
    parse_allow_list,
    read_keys,
    write_keys,
)
from octavo.actors.runtime.port import Port
from octavo.messages.errors import InvalidConfigError
from octavo.messages.request import CancelRequest


class Rig:
    """An engine with keys and an allow-list, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.list = folder / "peers.allow"
        self.keys = make_keys()
        self.edge_keys = make_keys()
        self.allow(f"{self.edge_keys.public} edge 0")
        self.engine = Port(
            "engine",
            1,
            keys=CurveKeys(self.keys.public, self.keys.secret, self.list),
            allowed={"edge": [CancelRequest]},
        )
        self.endpoint = self.engine.bind("tcp://127.0.0.1:*")
        self._opened: list[Port | RawPeer] = [self.engine]

    def allow(self, *lines: str) -> None:
        new = self.list.with_suffix(".new")
        new.write_text("# who may connect\n" + "\n".join(lines) + "\n")
        new.replace(self.list)

    def edge(self, keys: CurveKeys, server_key: str = "", name: str = "edge 0") -> Port:
        port = Port(name, 1, keys=keys)
        self._opened.append(port)
        port.connect("engine", 1, self.endpoint, server_key=(server_key or self.keys.public).encode())
        return port

    def raw(self, **fields: object) -> RawPeer:
        peer = RawPeer(self.endpoint, **fields)  # type: ignore[arg-type]
        self._opened.append(peer)
        return peer

    def close(self) -> None:
        for opened in self._opened:
            opened.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_a_peer_whose_key_is_on_the_list_is_heard(rig: Rig) -> None:
    edge = rig.edge(rig.edge_keys)
    edge.send("engine", cancel(5))
    pump = Pump(rig.engine, edge)
    pump.until(lambda: pump.numbers(rig.engine) == [5])
    assert edge.is_up("engine")


def test_hi_107_a_peer_without_curve_gets_no_message_through(rig: Rig) -> None:
    plain = rig.raw()
    plain.hello()
    plain.say(1, cancel(666))
    friend = rig.edge(rig.edge_keys)
    friend.send("engine", cancel(1))
    pump = Pump(rig.engine, friend)
    pump.until(lambda: pump.numbers(rig.engine) == [1])
    for _ in range(20):
        pump.turn(5)
    assert pump.numbers(rig.engine) == [1]
    assert not plain.answers()


def test_hi_107_a_key_that_is_not_on_the_list_gets_no_message_through(rig: Rig) -> None:
    stranger = rig.edge(make_keys())
    stranger.send("engine", cancel(666))
    pump = Pump(rig.engine, stranger)
    pump.until(lambda: ("engine", "keys") in pump.events["edge 0"])
    assert stranger.counters["handshake_failed"] > 0
    assert rig.engine.counters["denied_key"] > 0
    assert not pump.received["engine"]


def test_hi_107_a_peer_that_takes_us_for_another_server_gets_no_message_through(rig: Rig) -> None:
    edge = rig.edge(rig.edge_keys, server_key=make_keys().public)
    edge.send("engine", cancel(666))
    friend = rig.edge(rig.edge_keys)
    friend.send("engine", cancel(1))
    pump = Pump(rig.engine, friend)
    pump.until(lambda: pump.numbers(rig.engine) == [1])
    for _ in range(20):
        edge.receive()
        pump.turn(5)
    assert pump.numbers(rig.engine) == [1]
    assert not edge.is_up("engine")


def test_hi_107_a_revoked_key_ends_its_link_and_makes_no_other(rig: Rig) -> None:
    edge = rig.edge(rig.edge_keys)
    edge.send("engine", cancel(1))
    pump = Pump(rig.engine, edge)
    pump.until(lambda: pump.numbers(rig.engine) == [1])
    rig.allow()
    rig.engine.check_keys()
    edge.send("engine", cancel(666))
    pump.until(lambda: ("engine", "refused") in pump.events["edge 0"])
    edge.disconnect("engine")
    edge.connect("engine", 1, rig.endpoint, server_key=rig.keys.public.encode())
    edge.send("engine", cancel(667))
    pump.until(lambda: ("engine", "keys") in pump.events["edge 0"])
    assert pump.numbers(rig.engine) == [1]


def test_hi_107_a_key_speaks_for_the_one_name_it_was_given(rig: Rig) -> None:
    edge = rig.edge(rig.edge_keys, name="edge 1")
    edge.send("engine", cancel(666))
    pump = Pump(rig.engine, edge)
    pump.until(lambda: ("engine", "refused") in pump.events["edge 1"])
    assert not pump.received["engine"]


def test_hi_107_without_an_allow_list_nobody_gets_through(tmp_path: Path) -> None:
    keys = make_keys()
    engine = Port("engine", 1, keys=keys, allowed={"edge": [CancelRequest]})
    edge = Port("edge 0", 1, keys=make_keys())
    try:
        edge.connect("engine", 1, engine.bind("tcp://127.0.0.1:*"), server_key=keys.public.encode())
        edge.send("engine", cancel(1))
        pump = Pump(engine, edge)
        pump.until(lambda: ("engine", "keys") in pump.events["edge 0"])
        assert not pump.received["engine"]
    finally:
        edge.close()
        engine.close()


def test_connecting_over_tcp_needs_the_servers_key(rig: Rig) -> None:
    edge = Port("edge 0", 1, keys=rig.edge_keys)
    with pytest.raises(InvalidConfigError):
        edge.connect("engine", 1, rig.endpoint)
    with pytest.raises(InvalidConfigError, match="public key"):
        edge.connect("engine", 1, rig.endpoint, server_key=b"short")
    edge.close()


def test_a_key_file_is_readable_by_its_owner_alone_and_comes_back(tmp_path: Path) -> None:
    keys = make_keys()
    path = tmp_path / "host.key"
    old = os.umask(0)
    try:
        write_keys(keys, path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_keys(path) == keys
    assert keys.secret not in repr(keys)
    with pytest.raises(InvalidConfigError, match="exists"):
        write_keys(make_keys(), path)
    assert read_keys(path) == keys
    other = make_keys()
    write_keys(other, path, replace=True)
    assert read_keys(path) == other


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "host.key"
    write_keys(make_keys(), path)
    path.chmod(0o640)
    with pytest.raises(InvalidConfigError, match="0600"):
        read_keys(path)


@pytest.mark.parametrize("text", ["", "public x\nsecret y\n", "public {a.public}\nsecret {b.secret}\n"])
def test_a_file_without_a_pair_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "host.key"
    path.write_text(text.format(a=make_keys(), b=make_keys()))
    path.chmod(0o600)
    with pytest.raises(InvalidConfigError, match="no key pair"):
        read_keys(path)
    with pytest.raises(InvalidConfigError, match="octavo keys"):
        read_keys(tmp_path / "none")


def test_an_allow_list_names_keys_and_what_they_speak_for() -> None:
    any_name, one_name = make_keys().public, "#" + make_keys().public[1:]  # a key may begin like a comment
    names = parse_allow_list(f"# peers\n\n{any_name}\n{any_name[::-1]} edge 0 # the first\n")
    assert names[any_name] == ("",) and names[any_name[::-1]] == ("edge 0",)
    assert one_name not in names
    with pytest.raises(InvalidConfigError, match="line 2"):
        parse_allow_list("\nedge 0\n")


def test_a_key_with_several_lines_speaks_for_the_names_of_all(tmp_path: Path) -> None:
    path = tmp_path / "peers.allow"
    key, other = make_keys().public, make_keys().public
    path.write_text(f"{key} node ray.0\n{other} node b\n{key} node ray.1\n")
    allow_list = AllowList(path)
    names = ("node ray.0", "node ray.1", "node b", "edge 0")
    assert [allow_list.allows_name(key, name) for name in names] == [True, True, False, False]
    path.write_text(f"{other} node b\n{other}\n")
    allow_list.reload()
    assert [allow_list.allows_name(other, name) for name in names] == [True] * 4
    assert not allow_list.allows_name(key, "node ray.0")


def test_an_allow_list_that_cannot_be_read_allows_nobody(tmp_path: Path) -> None:
    path = tmp_path / "peers.allow"
    key = make_keys().public
    path.write_text(key)
    allow_list = AllowList(path)
    assert allow_list.allows(key)
    path.unlink()
    assert allow_list.reload()
    assert not allow_list.allows(key)
    path.write_text("nonsense")
    allow_list.reload()
    assert not allow_list.allows(key)


def test_zmq_has_curve() -> None:
    assert zmq.has("curve")
