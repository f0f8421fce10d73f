"""Raw sockets against a bound port: noise, lies, floods. The engine goes on hearing who it should."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from port_tools import Pump, RawPeer, cancel, open_port

from octavo.actors.runtime import envelope
from octavo.actors.runtime.port import Port
from octavo.actors.runtime.port_limits import PortLimits

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


class Rig:
    """A port, a peer that behaves, and raw connections."""

    def __init__(self, folder: Path, limits: PortLimits | None = None) -> None:
        folder.chmod(0o700)
        self.port: Port = open_port(limits=limits)
        self.endpoint = self.port.bind(f"ipc://{folder}/engine")
        self.path = self.endpoint.removeprefix("ipc://")
        self.good = RawPeer(self.endpoint)
        self.pump = Pump(self.port)
        self.good.greet(self.pump)
        self._sequence = 0
        self._opened: list[socket.socket] = []

    def connect(self) -> socket.socket:
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.connect(self.path)
        raw.settimeout(120)
        self._opened.append(raw)
        return raw

    def connect_as_dealer(self) -> socket.socket:
        """Past ZeroMQ's own handshake."""
        raw = self.connect()
        raw.sendall(GREETING)
        self.read(raw, 64)
        raw.sendall(READY)
        return raw

    def read(self, raw: socket.socket, size: int) -> bytes:
        held = b""
        while len(held) < size:
            piece = raw.recv(size - len(held))
            assert piece, "the port closed the connection"
            held += piece
        return held

    def await_close(self, raw: socket.socket) -> None:
        """The port must drop this connection."""
        raw.setblocking(False)

        def is_closed() -> bool:
            try:
                return raw.recv(65536) == b""
            except BlockingIOError:
                return False
            except ConnectionError:
                return True

        self.pump.until(is_closed)

    def probe(self) -> None:
        """The good peer is still heard, and nothing else was."""
        self._sequence += 1
        self.good.say(self._sequence, cancel(self._sequence))
        self.pump.until(lambda: len(self.pump.numbers(self.port)) >= self._sequence)
        assert self.pump.numbers(self.port) == list(range(1, self._sequence + 1))

    def close(self) -> None:
        for raw in self._opened:
            raw.close()
        self.good.close()
        self.port.close()


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_hi_105_random_bytes_on_200_connections_reach_no_actor_are_counted_and_cost_their_connections(rig: Rig) -> None:
    chance = random.Random(5)
    noisy = []
    for _ in range(200):
        raw = rig.connect()
        noisy.append(raw)
        with contextlib.suppress(ConnectionError):  # dropped while it spoke
            raw.sendall(chance.randbytes(chance.randrange(1, 3000)))
        rig.pump.turn(0)
    counters = rig.port.counters
    # ZeroMQ itself drops what is no peer of any version of its own; what looks like an old one may send, and is held
    # among the strangers.
    rig.pump.until(lambda: len(open_connections(noisy)) <= 64)
    rig.pump.until(lambda: counters["malformed"] + counters["multipart"] + counters["foreign"] > 0)
    assert 0 < counters["stranger"] <= 200 - 64
    rig.probe()
    for raw in noisy:
        raw.close()
    strangers = rig.port._reception.strangers
    rig.pump.until(lambda: strangers is not None and len(strangers) == 0)
    rig.probe()


def test_hi_105_noise_within_the_protocol_is_counted_as_malformed(rig: Rig) -> None:
    chance = random.Random(6)
    noisy = RawPeer(rig.endpoint)
    for size in range(1, 101):
        noisy.socket.send(chance.randbytes(size))
    rig.pump.until(lambda: rig.port.counters["malformed"] == 100)
    noisy.close()
    rig.probe()


def test_hi_106_silence_after_the_greeting_is_dropped_at_the_handshake_limit(tmp_path: Path) -> None:
    rig = Rig(tmp_path, PortLimits(handshake_ms=100))
    try:
        silent = [rig.connect() for _ in range(32)]
        for number, raw in enumerate(silent):
            raw.sendall(GREETING[: 64 if number % 2 else 10])
        for raw in silent:
            rig.await_close(raw)
        rig.probe()
    finally:
        rig.close()


def open_connections(silent: list[socket.socket]) -> list[socket.socket]:
    """Those that the port has not closed."""

    def is_open(raw: socket.socket) -> bool:
        raw.setblocking(False)
        try:
            while raw.recv(65536):
                pass
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        return False

    return [raw for raw in silent if is_open(raw)]


def test_hi_106_of_those_who_say_nothing_64_are_held_and_the_oldest_give_way(rig: Rig) -> None:
    silent = []
    for number in range(200):
        raw = rig.connect_as_dealer() if number % 3 == 0 else rig.connect()
        if number % 3 == 1:
            raw.sendall(GREETING)
        silent.append(raw)
        rig.pump.turn(0)
    rig.pump.until(lambda: rig.port.counters["stranger"] == 200 - 64)
    rig.pump.until(lambda: len(open_connections(silent)) <= 64)
    assert set(open_connections(silent)) <= set(silent[-64:])
    rig.probe()  # who has said hello is none of them
    late = RawPeer(rig.endpoint, name="edge 1")
    late.greet(rig.pump)
    assert rig.port.counters["reconnected"] == 0
    late.close()


def test_hi_106_who_has_said_hello_is_no_stranger_however_many_there_are(tmp_path: Path) -> None:
    rig = Rig(tmp_path, PortLimits(max_strangers=2))
    try:
        peers = []
        for number in range(1, 9):
            peers.append(RawPeer(rig.endpoint, name=f"edge {number}"))
            peers[-1].greet(rig.pump)
        silent = [rig.connect() for _ in range(4)]
        rig.pump.until(lambda: rig.port.counters["stranger"] == 2)
        rig.pump.until(lambda: open_connections(silent) == silent[2:])
        for number, peer in enumerate(peers, 1):
            peer.say(1, cancel(number))
        rig.pump.until(lambda: sorted(rig.pump.numbers(rig.port)) == list(range(1, 9)))
        for peer in peers:
            peer.close()
    finally:
        rig.close()


@pytest.mark.parametrize("size", [1 << 40, 8 << 30, (1 << 20) + envelope.HEAD_BYTES + 1])
def test_hi_108_a_frame_longer_than_allowed_costs_the_connection_and_no_memory(tmp_path: Path, size: int) -> None:
    rig = Rig(tmp_path, PortLimits(max_message_bytes=1 << 20))
    try:
        raw = rig.connect_as_dealer()
        before = psutil.Process().memory_info().rss
        raw.sendall(b"\x02" + struct.pack(">Q", size) + bytes(1000))
        rig.await_close(raw)
        assert psutil.Process().memory_info().rss - before < 64 << 20
        rig.probe()
    finally:
        rig.close()


def test_hi_108_the_longest_message_allowed_passes(tmp_path: Path) -> None:
    rig = Rig(tmp_path, PortLimits(max_message_bytes=1 << 20))
    try:
        raw = rig.connect_as_dealer()
        frame = bytes((1 << 20) + envelope.HEAD_BYTES)
        raw.sendall(b"\x02" + struct.pack(">Q", len(frame)) + frame)
        rig.pump.until(lambda: rig.port.counters["malformed"] == 1)  # it came through, and is no frame of ours
        rig.probe()
    finally:
        rig.close()


@pytest.mark.parametrize("num_parts", [2, 3, 200_000])
@pytest.mark.parametrize("knows_us", [False, True])
def test_hi_109_messages_of_several_parts_are_dropped_and_counted(rig: Rig, num_parts: int, knows_us: bool) -> None:
    peer = RawPeer(rig.endpoint, name="edge 1")
    if knows_us:
        peer.greet(rig.pump)
    peer.socket.send_multipart([peer.frame(1, cancel(666))] + [b"x"] * (num_parts - 1))
    rig.pump.until(lambda: rig.port.counters["multipart"] == 1)
    rig.probe()
    peer.close()


def test_hi_109_empty_parts_are_dropped_and_counted(rig: Rig) -> None:
    peer = RawPeer(rig.endpoint, name="edge 1")
    peer.socket.send(b"")
    peer.socket.send_multipart([b"", b""])
    rig.pump.until(lambda: rig.port.counters["malformed"] == 1 and rig.port.counters["multipart"] == 1)
    peer.greet(rig.pump)
    peer.socket.send(b"")
    rig.pump.until(lambda: rig.port.counters["malformed"] == 2)
    rig.probe()
    peer.close()


def test_hi_109_tensors_are_refused_where_none_are_expected(rig: Rig) -> None:
    peer = RawPeer(rig.endpoint, name="edge 1")
    peer.greet(rig.pump)
    peer.socket.send_multipart([envelope.seal(envelope.DATA, 1, 1, b"", num_tensors=1), bytes(100)])
    rig.pump.until(lambda: rig.port.counters["multipart"] == 1)
    rig.probe()
    peer.close()


@pytest.mark.parametrize("body", [b"", b"\xc1", b"not msgpack", b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000])
def test_hi_110_a_valid_envelope_around_nonsense_is_counted_and_the_link_goes_on(rig: Rig, body: bytes) -> None:
    peer = RawPeer(rig.endpoint, name="edge 1")
    peer.greet(rig.pump)
    peer.say(1, body)
    peer.say(2, cancel(50))
    rig.pump.until(lambda: (rig.pump.numbers(rig.port, "edge 1")) == [50])
    assert rig.port.counters["malformed"] == 1
    peer.close()


def test_hi_110_a_hello_of_nonsense_is_counted(rig: Rig) -> None:
    peer = RawPeer(rig.endpoint, name="edge 1")
    for body in (b"", b"\xc1", b"\x91" * 50_000, envelope.encode_control({"name": "edge 1"})):
        peer.socket.send(envelope.seal(envelope.HELLO, 1, 0, body))
    rig.pump.until(lambda: rig.port.counters["malformed"] == 4)
    rig.probe()
    peer.close()


@pytest.mark.parametrize("kind", [envelope.WELCOME, envelope.REFUSE, envelope.GRANT, envelope.RESET, 99])
def test_a_sender_that_talks_like_a_receiver_is_ignored(rig: Rig, kind: int) -> None:
    peer = RawPeer(rig.endpoint, name="edge 1")
    peer.greet(rig.pump)
    peer.socket.send(envelope.seal(kind, 1, 5))
    rig.pump.until(lambda: rig.port.counters["malformed"] == 1)
    rig.probe()
    peer.close()


def test_hi_121_connecting_and_leaving_a_thousand_times_leaks_no_descriptor(rig: Rig) -> None:
    def num_open() -> int:
        return num_descriptors()

    before = num_open()
    for number in range(1000):
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.connect(rig.path)
        if number % 2:
            raw.sendall(GREETING)
        raw.close()
        if number % 10 == 0:
            rig.pump.turn(0)
    rig.pump.until(lambda: num_open() <= before)
    rig.probe()


def test_hi_121_links_that_come_and_go_leave_no_descriptor_and_a_bounded_memory(tmp_path: Path) -> None:
    rig = Rig(tmp_path, PortLimits(max_peers=4))
    try:
        before = num_descriptors()
        for incarnation in range(1, 60):
            peer = RawPeer(rig.endpoint, name="edge 1", incarnation=incarnation)
            peer.greet(rig.pump)
            peer.close()
        rig.pump.until(lambda: num_descriptors() <= before)
        assert len(rig.port._reception.by_routing_id) <= 16
        rig.good.hello()
        rig.probe()
    finally:
        rig.close()
