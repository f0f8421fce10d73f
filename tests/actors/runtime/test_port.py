"""Links between two ports: order, room, loss and return, versions and incarnations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from port_tools import Pump, RawPeer, cancel, open_port, with_data

from octavo.actors.runtime import envelope
from octavo.actors.runtime.port import Port, UnsendableError, role_of
from octavo.actors.runtime.port_limits import PortLimits
from octavo.messages.ids import RequestId
from octavo.messages.request import CancelRequest, StopMatched, SubmitRequest
from octavo.messages.sampling import SamplingParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class House:
    """Opens ports and peers, and closes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: list[Port | RawPeer] = []

    def port(self, name: str = "engine", incarnation: int = 1, **fields: object) -> tuple[Port, str]:
        port = open_port(name, incarnation, **fields)  # type: ignore[arg-type]
        self._opened.append(port)
        return port, port.bind(f"ipc://{self.folder}/{name.replace(' ', '-')}.{incarnation}")

    def raw(self, endpoint: str, **fields: object) -> RawPeer:
        peer = RawPeer(endpoint, **fields)  # type: ignore[arg-type]
        self._opened.append(peer)
        return peer

    def close(self) -> None:
        for opened in self._opened:
            opened.close()


@pytest.fixture
def house(folder: Path) -> Iterator[House]:
    house = House(folder)
    yield house
    house.close()


def test_messages_sent_before_the_welcome_arrive_in_order(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    assert all(edge.send("engine", cancel(number)) for number in range(5000))
    pump = Pump(engine, edge)
    pump.until(lambda: len(pump.numbers(engine)) == 5000)
    assert pump.numbers(engine, "edge 0") == list(range(5000))
    assert edge.is_up("engine")
    assert not any(engine.counters.values()) and not any(edge.counters.values())


@pytest.mark.parametrize(
    "message",
    [
        SubmitRequest(RequestId(1), bytes(4 << 16), SamplingParams()),
        SubmitRequest(RequestId(1), bytes(4), SamplingParams(), cache_salt="\ud800"),
        SubmitRequest(RequestId(1), bytes(4), SamplingParams(), deadline_ns=2**64),
    ],
    ids=["too long", "half a character", "65 bits"],
)
def test_a_message_that_cannot_be_sent_is_told_from_a_peer_that_takes_none(
    house: House, message: SubmitRequest
) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0", limits=PortLimits(max_message_bytes=1 << 16))
    edge.connect("engine", 1, endpoint)
    edge.send("engine", cancel(0))
    with pytest.raises(UnsendableError):
        edge.send("engine", message)
    edge.send("engine", cancel(1))
    pump = Pump(engine, edge)
    pump.until(lambda: pump.numbers(engine) == [0, 1])  # the connection stands


def test_a_blocking_process_waits_for_messages(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    engine.receive()  # binding woke it
    assert not engine.wait(0)
    edge.connect("engine", 1, endpoint)
    for number in range(50):
        edge.send("engine", cancel(number))
        received = []
        while not received:
            engine.wait(50)
            received = engine.receive()
            edge.receive()
        assert received == [("edge 0", cancel(number))]
    assert not engine.wait(1)


def test_no_message_is_left_without_an_announcement(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    pump = Pump(engine, edge)
    pump.until(lambda: edge.is_up("engine"))
    sent = 0
    for size in (1, 2, 7, 1, 1, 64):
        for number in range(size):
            edge.send("engine", cancel(sent + number))
        received = []
        while len(received) < size:
            assert not received or engine.has_more or engine.wait(60_000)  # an edge tells of what a reading left
            received += engine.receive()
        assert received == [("edge 0", cancel(sent + number)) for number in range(size)]
        sent += size


def test_a_batch_cut_short_says_that_there_is_more(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    for number in range(50):
        edge.send("engine", cancel(number))
    pump = Pump(engine, edge)
    pump.until(lambda: edge.is_up("engine"))
    received: list[object] = list(pump.received["engine"])
    while len(received) < 50:
        assert engine.wait(60_000)
        batch = engine.receive(max_messages=8)
        assert len(batch) <= 8
        if len(batch) == 8:
            assert engine.has_more and engine.wait(0)
        received += batch
    assert len(received) == 50


def test_a_role_is_a_name_without_its_number() -> None:
    assert [role_of(name) for name in ("executor 3", "engine", "edge.12", "a-1")] == ["executor", "engine", "edge", "a"]


def test_what_a_peer_may_not_send_is_dropped_and_counted(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    edge.send("engine", StopMatched(cancel(1).request_id))
    edge.send("engine", cancel(2))
    pump = Pump(engine, edge)
    pump.until(lambda: pump.numbers(engine) == [2])
    assert engine.counters["malformed"] == 1
    assert len(pump.received["engine"]) == 1
    assert ("edge 0", "malformed") in pump.events["engine"]


def test_an_unknown_peer_is_refused_with_a_reason(house: House) -> None:
    engine, endpoint = house.port()
    other, _ = house.port("router 0")
    other.connect("engine", 1, endpoint)
    other.send("engine", cancel(1))
    pump = Pump(engine, other)
    pump.until(lambda: ("engine", "refused") in pump.events["router 0"])
    assert not other.send("engine", cancel(2))
    assert other.counters["full"] == 1
    assert not pump.received["engine"]


def test_sending_without_a_line_is_refused_and_counted(house: House) -> None:
    engine, _ = house.port()
    assert not engine.send("edge 0", cancel(1))
    assert engine.counters["full"] == 1


def test_two_builds_whose_messages_differ_refuse_each_other(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0", schema="0" * 32)
    edge.connect("engine", 1, endpoint)
    pump = Pump(engine, edge)
    pump.until(lambda: ("engine", "refused") in pump.events["edge 0"])
    assert engine.counters["refused_hello"] == 1


@pytest.mark.parametrize("version", [0, 2, 65535])
def test_hi_113_another_protocol_version_is_refused_at_hello_with_both_named(house: House, version: int) -> None:
    engine, endpoint = house.port()
    raw = house.raw(endpoint)
    pump = Pump(engine)
    hello = envelope.seal(envelope.HELLO, 1, 0, b"whatever that version says")
    raw.socket.send(with_data(version, hello))
    _, body = raw.await_answer(pump, envelope.REFUSE)
    refuse = envelope.decode_refuse(body)
    assert refuse.code == "version"
    assert f"version {envelope.PROTOCOL_VERSION}" in refuse.why and f"version {version}" in refuse.why


def test_f_62_builds_with_other_messages_refuse_each_other_at_hello_and_decode_nothing(house: House) -> None:
    engine, endpoint = house.port(schema="version N")
    executor, _ = house.port("edge 0", schema="version N+1")
    executor.connect("engine", 1, endpoint)
    executor.send("engine", cancel(1))
    pump = Pump(engine, executor)
    pump.until(lambda: ("engine", "refused") in pump.events["edge 0"])
    assert engine.counters["refused_hello"] == 1
    assert pump.numbers(engine) == []
    assert not executor.is_up("engine")


def test_hi_113_another_protocol_version_in_the_middle_of_a_session_is_dropped(house: House) -> None:
    engine, endpoint = house.port()
    raw = house.raw(endpoint)
    pump = Pump(engine)
    raw.greet(pump)
    raw.socket.send(with_data(2, raw.frame(1, cancel(1))))
    raw.say(1, cancel(2))
    pump.until(lambda: pump.numbers(engine) == [2])
    assert engine.counters["version"] == 1


def test_hi_114_a_replayed_message_is_ignored_and_counted(house: House) -> None:
    engine, endpoint = house.port()
    raw = house.raw(endpoint)
    pump = Pump(engine)
    raw.greet(pump)
    for sequence in (1, 2, 1, 2, 2, 3):
        raw.say(sequence, cancel(sequence))
    pump.until(lambda: pump.numbers(engine) == [1, 2, 3])
    assert engine.counters["repeated"] == 3


def test_hi_114_a_replayed_hello_takes_nobodys_place(house: House) -> None:
    engine, endpoint = house.port()
    raw, thief = house.raw(endpoint), house.raw(endpoint)
    pump = Pump(engine)
    raw.greet(pump)
    thief.hello()  # the very same bytes on another connection
    _, body = thief.await_answer(pump, envelope.REFUSE)
    assert envelope.decode_refuse(body).code == "repeated"
    thief.say(1, cancel(666))
    raw.say(1, cancel(1))
    pump.until(lambda: pump.numbers(engine) == [1] and engine.counters["foreign"] == 1)


def test_hi_115_messages_of_a_dead_incarnation_are_ignored(house: House) -> None:
    engine, endpoint = house.port()
    old = house.raw(endpoint)
    pump = Pump(engine)
    old.greet(pump)
    old.say(1, cancel(1))
    pump.until(lambda: pump.numbers(engine) == [1])
    engine.expect("edge 0", 2)
    new = house.raw(endpoint, incarnation=2)
    new.greet(pump)
    old.say(2, cancel(2))
    new.say(1, cancel(3))
    pump.until(lambda: pump.numbers(engine) == [1, 3] and engine.counters["stale_incarnation"] == 1)
    _, body = old.await_answer(pump, envelope.REFUSE)
    assert envelope.decode_refuse(body).code == "stale"
    old.hello()
    pump.until(lambda: engine.counters["stale_incarnation"] == 2)
    assert pump.numbers(engine) == [1, 3]


def test_hi_115_a_replacement_that_is_announced_silences_the_old_one_before_it_speaks(house: House) -> None:
    engine, endpoint = house.port()
    old = house.raw(endpoint)
    pump = Pump(engine)
    old.greet(pump)
    engine.expect("edge 0", 2)
    old.say(1, cancel(1))
    pump.until(lambda: engine.counters["stale_incarnation"] == 1)
    assert not pump.numbers(engine)


def test_hi_115_a_message_that_names_another_incarnation_than_its_link_is_dropped(house: House) -> None:
    engine, endpoint = house.port()
    raw = house.raw(endpoint)
    pump = Pump(engine)
    raw.greet(pump)
    raw.say(1, cancel(1), incarnation=9)
    raw.say(1, cancel(2))
    pump.until(lambda: pump.numbers(engine) == [2])
    assert engine.counters["stale_incarnation"] == 1


def test_hi_115_f_34_what_waited_for_a_dead_peer_does_not_reach_its_successor(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    pump = Pump(engine, edge)
    pump.until(lambda: edge.is_up("engine"))
    engine.close()
    for number in range(10):
        edge.send("engine", cancel(number))
    successor = open_port("engine", 2)
    successor.bind(endpoint)  # even on the very same path
    try:
        after = Pump(successor, edge)
        after.until(lambda: ("engine", "refused") in after.events["edge 0"])
        assert not after.received["engine"]
        edge.connect("engine", 2, endpoint)
        edge.send("engine", cancel(99))
        after.until(lambda: after.numbers(successor) == [99])
    finally:
        successor.close()


def test_hi_116_a_gap_breaks_the_link_until_the_sender_goes_on_from_there(house: House) -> None:
    engine, endpoint = house.port()
    raw = house.raw(endpoint)
    pump = Pump(engine)
    raw.greet(pump)
    raw.say(1, cancel(1))
    raw.say(3, cancel(3))
    raw.say(4, cancel(4))
    sequence, _ = raw.await_answer(pump, envelope.RESET)
    assert sequence == 2
    assert engine.counters["gap"] == 1
    assert pump.numbers(engine) == [1]
    assert ("edge 0", "gap") in pump.events["engine"]
    for number in range(raw.greet(pump), 6):
        raw.say(number, cancel(number))
    pump.until(lambda: pump.numbers(engine) == [1, 2, 3, 4, 5])
    assert engine.counters["reconnected"] == 1


def test_hi_116_a_port_that_is_told_of_a_gap_loses_and_repeats_nothing(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    pump = Pump(engine, edge)
    pump.until(lambda: edge.is_up("engine"))
    for number in range(2000):
        if number % 100 == 50:  # a message that vanishes on its way
            engine._reception.break_link(engine._door.router, engine._reception._incoming["edge 0"])  # type: ignore[arg-type]
        edge.send("engine", cancel(number))
        if number % 10 == 0:
            pump.turn(0)
    pump.until(lambda: len(pump.numbers(engine)) >= 2000)
    assert pump.numbers(engine) == list(range(2000))
    assert edge.counters["resent"] > 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "nonsense"])
def test_f_30_a_damaged_message_that_is_the_last_of_its_link_is_asked_for_again(
    house: House, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    pump = Pump(engine, edge)
    pump.until(lambda: edge.is_up("engine"))
    dealer = edge._lines.by_peer["engine"].dealer
    num_damaged = 0

    class DamagingDealer:
        """Damages the first message of each burst."""

        def send(self, frame: bytes, *arguments: object) -> None:
            nonlocal num_damaged
            if num_damaged < num_bursts:
                num_damaged += 1
                flipped = bytes([frame[0] ^ 1]) + frame[1:]
                frame = {"flipped": flipped, "cut": frame[:-1], "nonsense": b"?"}[damage]
            dealer.send(frame, *arguments)  # type: ignore[arg-type]

    link = edge._lines.by_peer["engine"].link
    monkeypatch.setattr(link, "_socket", DamagingDealer())
    for num_bursts in range(1, 6):  # the dealer looks at it
        edge.send("engine", cancel(num_bursts))
        # Silence: nothing else is sent that would show a gap.
        pump.until(lambda: len(pump.numbers(engine)) == num_bursts)  # noqa: B023  # at once
    assert pump.numbers(engine) == [1, 2, 3, 4, 5]
    assert engine.counters["malformed"] == 5 == edge.counters["resent"]
    assert engine.counters["gap"] == 0


@pytest.mark.parametrize("kind", [envelope.WELCOME, envelope.GRANT, envelope.RESET])
def test_f_30_a_damaged_answer_makes_the_sender_say_hello_again(
    house: House, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.actors.runtime import door, reception

    damaged: list[bytes] = []
    reply = reception.reply

    def reply_damaged(router: object, routing_id: bytes, frame: bytes) -> bool:
        if not damaged and envelope.unseal(frame).kind == kind:
            damaged.append(frame)
            frame = bytes([frame[0] ^ 1]) + frame[1:]
        return reply(router, routing_id, frame)  # type: ignore[arg-type]

    for module in (door, reception):
        monkeypatch.setattr(module, "reply", reply_damaged)
    limits = PortLimits(window=8)
    engine, endpoint = house.port(limits=limits)
    edge, _ = house.port("edge 0", limits=limits)
    edge.connect("engine", 1, endpoint)
    pump = Pump(engine, edge)
    for number in range(20):
        edge.send("engine", cancel(number))
    pump.until(lambda: len(pump.numbers(engine)) >= 10)
    if kind == envelope.RESET:
        line = edge._lines.by_peer["engine"]
        line.dealer.send(b"damaged")
        edge._lines.read(line)  # sending may have swallowed an edge, which `Port.send` looks for
    pump.until(lambda: edge.num_queued("engine") < 8 and len(pump.numbers(engine)) == 20 and bool(damaged))
    edge.send("engine", cancel(20))
    pump.until(lambda: len(pump.numbers(engine)) == 21)
    assert pump.numbers(engine) == list(range(21))
    assert edge.counters["malformed"] == 1


def test_hi_116_a_torn_connection_loses_and_repeats_nothing(house: House, folder: Path) -> None:
    """The receiver's socket goes and comes back under the same process, as a network does."""
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0", limits=PortLimits(window=64))
    edge.connect("engine", 1, endpoint)
    pump = Pump(engine, edge)
    pump.until(lambda: edge.is_up("engine"))
    sent = 0
    for _ in range(3):
        pump.until(lambda: edge.is_up("engine"))
        for _ in range(500):
            edge.send("engine", cancel(sent))
            sent += 1
        pump.turn(0)
        router = engine._door.router
        assert router is not None
        engine._watcher.unwatch(router)
        router.close(0)  # whatever lay in it is lost
        engine._door.router = None
        engine._door.has_more = engine._door._is_discarding = False
        edge.send("engine", cancel(sent))
        sent += 1
        pump.until(lambda: ("engine", "lost") in pump.events["edge 0"])
        pump.events["edge 0"].clear()
        engine.bind(endpoint)
    pump.until(lambda: len(pump.numbers(engine)) >= sent)
    assert pump.numbers(engine) == list(range(sent))
    assert engine.counters["reconnected"] == 3


def test_hi_117_a_second_peer_of_the_same_name_is_refused_and_the_first_stays(house: House) -> None:
    engine, endpoint = house.port()
    first, second = house.raw(endpoint), house.raw(endpoint)
    second.session = b"another process!"
    second.attempt = 5
    pump = Pump(engine)
    first.greet(pump)
    second.hello()
    _, body = second.await_answer(pump, envelope.REFUSE)
    assert envelope.decode_refuse(body).code == "taken"
    second.say(1, cancel(666))
    first.say(1, cancel(1))
    pump.until(lambda: pump.numbers(engine) == [1] and engine.counters["foreign"] == 1)


def test_hi_117_the_same_routing_id_does_not_displace_the_first(house: House) -> None:
    import zmq

    engine, endpoint = house.port()
    first = house.raw("ipc:///dev/null/unused")
    second = house.raw("ipc:///dev/null/unused")
    for peer in (first, second):
        peer.socket.close(0)
        peer.socket = peer._context.socket(zmq.DEALER)
        peer.socket.set(zmq.ROUTING_ID, b"edge 0")
        peer.socket.connect(endpoint)
        if peer is first:
            pump = Pump(engine)
            first.greet(pump)
    second.say(1, cancel(666))
    for number in range(1, 50):
        first.say(number, cancel(number))
    pump.until(lambda: len(pump.numbers(engine)) == 49)
    assert pump.numbers(engine) == list(range(1, 50))


def test_hi_117_a_claim_that_nobody_announced_waits_while_the_first_is_connected(house: House) -> None:
    engine, endpoint = house.port()
    engine.expect("edge 0", 1)
    first, bogus = house.raw(endpoint), house.raw(endpoint, incarnation=2**64 - 1)
    pump = Pump(engine)
    first.greet(pump)
    bogus.hello()
    pump.until(lambda: engine.counters["parked"] == 1)
    bogus.say(1, cancel(666))
    first.say(1, cancel(1))
    pump.until(lambda: pump.numbers(engine) == [1] and engine.counters["foreign"] == 1)
    # The next one is welcomed however high the claim was, which goes on waiting.
    engine.expect("edge 0", 2)
    second = house.raw(endpoint, incarnation=2)
    bogus.answers()
    second.greet(pump)
    second.say(1, cancel(2))
    first.say(2, cancel(777))
    pump.until(lambda: pump.numbers(engine) == [1, 2] and engine.counters["stale_incarnation"] == 1)


def test_hi_117_a_claim_is_welcomed_when_it_is_announced_and_nobody_has_to_say_anything_for_it(house: House) -> None:
    engine, endpoint = house.port()
    first, new = house.raw(endpoint), house.raw(endpoint, incarnation=2)
    pump = Pump(engine)
    first.greet(pump)
    new.hello()
    pump.until(lambda: engine.counters["parked"] == 1)
    pump.turn(0)
    assert not [kind for kind, _, _ in new.answers() if kind == envelope.WELCOME]
    engine.expect("edge 0", 2)
    new.await_answer(pump, envelope.WELCOME)
    new.say(1, cancel(1))
    pump.until(lambda: pump.numbers(engine) == [1])


def test_hi_117_a_claim_is_welcomed_when_the_first_has_gone_and_one_who_was_announced_gets_the_name_back(
    house: House,
) -> None:
    """As an edge does that takes the place of a dead one, which only it can tell; and what a stranger gains by it."""
    engine, endpoint = house.port()
    engine.expect("edge 0", 1)
    first, bogus = house.raw(endpoint), house.raw(endpoint, incarnation=2**64 - 1)
    pump = Pump(engine)
    first.greet(pump)
    for number in range(1, 11):
        first.say(number, cancel(number))
    bogus.hello()
    pump.until(lambda: len(pump.numbers(engine)) == 10 and engine.counters["parked"] == 1)
    first.close()
    bogus.await_answer(pump, envelope.WELCOME)
    bogus.say(1, cancel(666))
    pump.until(lambda: 666 in pump.numbers(engine))
    # The connection was torn, no more: the process goes on where it was.
    again = house.raw(endpoint)
    again.session, again.attempt = first.session, first.attempt
    assert again.greet(pump) == 11
    bogus.say(2, cancel(667))
    again.say(11, cancel(11))
    pump.until(lambda: 11 in pump.numbers(engine))
    bogus.await_answer(pump, envelope.RESET)
    bogus.hello(first_sequence=1)
    pump.until(lambda: engine.counters["parked"] == 2)
    assert pump.numbers(engine) == [*range(1, 11), 666, 11]


def test_hi_117_a_real_one_that_comes_after_a_bogus_one_gets_its_name_and_the_other_goes_on_where_it_was(
    house: House,
) -> None:
    engine, endpoint = house.port()
    quick, announced = house.raw(endpoint, incarnation=7), house.raw(endpoint, incarnation=3)
    pump = Pump(engine)
    quick.greet(pump)
    quick.say(1, cancel(1))
    pump.until(lambda: pump.numbers(engine) == [1])
    engine.expect("edge 0", 3)
    announced.greet(pump)
    announced.say(1, cancel(2))
    quick.await_answer(pump, envelope.RESET)
    quick.hello(first_sequence=1)  # the first is not granted, as far as it knows
    pump.until(lambda: pump.numbers(engine) == [1, 2] and engine.counters["parked"] == 1)
    engine.expect("edge 0", 7)  # it was real, and earlier than the news of it
    assert quick.await_answer(pump, envelope.WELCOME)[0] == 2
    quick.say(1, cancel(1))
    quick.say(2, cancel(3))
    pump.until(lambda: pump.numbers(engine) == [1, 2, 3])
    assert engine.counters["repeated"] == 1


def test_the_newest_start_of_a_role_that_nobody_else_tells_of_takes_the_place_of_the_first(house: House) -> None:
    engine, endpoint = house.port(self_announced=("edge",))
    first, second = house.raw(endpoint), house.raw(endpoint, incarnation=2)
    pump = Pump(engine)
    first.greet(pump)
    second.greet(pump)
    second.say(1, cancel(2))
    first.hello()  # which is older, and waits
    pump.until(lambda: pump.numbers(engine) == [2] and engine.counters["parked"] == 1)


def test_hi_117_of_those_who_claim_a_name_four_wait_and_the_next_may_come_again(house: House) -> None:
    engine, endpoint = house.port()
    first = house.raw(endpoint)
    pump = Pump(engine)
    first.greet(pump)
    claims = [house.raw(endpoint, incarnation=number) for number in range(2, 7)]
    for number, claim in enumerate(claims):
        claim.session = number.to_bytes(16)
        claim.hello()
        pump.until(lambda: engine.counters["parked"] + engine.counters["refused_hello"] == number + 1)  # noqa: B023  # at once
    assert engine.counters["parked"] == 4
    claims[0].close()
    pump.until(lambda: engine._reception.strangers is not None and len(engine._reception.strangers) <= 4)
    claims[4].hello()  # its connection was shut, and is made again
    pump.until(lambda: engine.counters["parked"] == 5)
    engine.expect("edge 0", 6)
    claims[4].await_answer(pump, envelope.WELCOME)
    for claim in claims[1:4]:
        _, body = claim.await_answer(pump, envelope.REFUSE)
        assert envelope.decode_refuse(body).code == "stale"


def test_hi_119_a_peer_that_never_reads_is_shed_and_the_others_are_served(house: House) -> None:
    limits = PortLimits(window=32, max_queued=100)
    deaf, deaf_at = house.port("executor 0", peers=("engine",))
    good, good_at = house.port("executor 1", peers=("engine",))
    engine, _ = house.port(limits=limits)
    engine.connect("executor 0", 1, deaf_at)
    engine.connect("executor 1", 1, good_at)
    pump = Pump(good, engine)  # nobody ever looks at `deaf`
    for number in range(1000):
        engine.send("executor 0", cancel(number))
        assert engine.send("executor 1", cancel(number))
        if number % 20 == 0:
            pump.until(lambda: engine.num_queued("executor 1") < 60)
    pump.until(lambda: len(pump.numbers(good)) == 1000)
    assert engine.num_queued("executor 0") == 100
    assert engine.counters["full"] == 900
    # Nothing of what was accepted is lost once it reads after all.
    both = Pump(deaf, engine)
    both.until(lambda: len(both.numbers(deaf)) == 100)
    assert both.numbers(deaf) == list(range(100))


def test_hi_119_the_bound_in_bytes_holds_too(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0", limits=PortLimits(max_queued_bytes=1000))
    edge.connect("engine", 1, endpoint)
    accepted = sum(edge.send("engine", cancel(10**9)) for _ in range(100))
    assert 0 < accepted < 100
    pump = Pump(engine, edge)
    pump.until(lambda: len(pump.numbers(engine)) == accepted)


class SteppedClock:
    """Stands in for the port's `time`."""

    def __init__(self) -> None:
        self.now_ns = 10**12

    def monotonic_ns(self) -> int:
        return self.now_ns


def test_hi_120_a_flood_of_valid_messages_is_taken_at_the_rate_of_the_limits(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SteppedClock()
    monkeypatch.setattr("octavo.actors.runtime.port.time", clock)
    limits = PortLimits(window=100, max_messages_per_s=1000, burst_s=0.1)
    engine, endpoint = house.port(limits=limits)
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    for number in range(3000):
        edge.send("engine", cancel(number))
    pump = Pump(engine, edge)
    # The clock stands: a burst (100), and the window (100) that had been granted by then.
    pump.until(lambda: engine.counters["held_back"] > 0 and edge.is_up("engine"))
    for _ in range(50):
        pump.turn(1)
    at_first = len(pump.numbers(engine))
    assert at_first <= 300
    assert engine.delay_ms() is not None
    for _ in range(1000):  # a second, by milliseconds
        clock.now_ns += 1_000_000
        pump.turn(1)
    assert len(pump.numbers(engine)) <= at_first + 1000 + 200
    assert len(pump.numbers(engine)) >= at_first + 500

    def pass_time() -> bool:
        clock.now_ns += 10**9
        return len(pump.numbers(engine)) == 3000

    pump.until(pass_time)
    assert pump.numbers(engine) == list(range(3000))


def test_hi_120_a_role_has_a_window_and_rates_of_its_own_and_the_others_have_the_port_s(house: House) -> None:
    narrow = PortLimits(window=8, max_messages_per_s=1, burst_s=0.001)
    wide = PortLimits(window=64, max_messages_per_s=10**6)
    engine = Port(
        "engine",
        1,
        allowed={"edge": [CancelRequest], "executor": [CancelRequest]},
        limits=wide,
        limits_of={"edge": narrow},
    )
    house._opened.append(engine)
    endpoint = engine.bind(f"ipc://{house.folder}/engine")
    pump = Pump(engine)
    for name, window in (("edge 0", 8), ("executor 0", 64)):
        raw = house.raw(endpoint, name=name)
        raw.hello()
        _, body = raw.await_answer(pump, envelope.WELCOME)
        assert envelope.decode_welcome(body).window == window
        for number in range(1, min(window, 40) + 1):
            raw.say(number, cancel(number))
        pump.until(lambda: len(pump.numbers(engine, name)) == min(window, 40))  # noqa: B023  # at once
        pump.until(lambda: engine.counters["held_back"] == 1)  # the edge's grant
        if name == "edge 0":
            raw.say(9, cancel(9))
            pump.until(lambda: engine.counters["overrun"] == 1)


def test_hi_120_a_peer_that_sends_beyond_its_window_gains_nothing(house: House) -> None:
    limits = PortLimits(window=16, max_messages_per_s=1, burst_s=0.001)
    engine, endpoint = house.port(limits=limits)
    raw = house.raw(endpoint)
    pump = Pump(engine)
    raw.greet(pump)
    for number in range(1, 500):
        raw.say(number, cancel(number))
    pump.until(lambda: engine.counters["overrun"] > 0)
    for _ in range(20):
        pump.turn(1)
    assert len(pump.numbers(engine)) == 16
    assert ("edge 0", "overrun") in pump.events["engine"]


STOPPED_PEER = """
import sys
from octavo.actors.runtime.port import Port
from octavo.messages.ids import RequestId
from octavo.messages.request import CancelRequest
port = Port("edge 0", 1, allowed={"engine": [CancelRequest]}, schema="of the test")
port.connect("engine", 1, sys.argv[1])
number = 0
refused = False
while not refused:
    port.wait(10)
    port.receive()
    if port.is_up("engine"):
        number += 1
        port.send("engine", CancelRequest(RequestId(number)))
    refused = any(event.what == "refused" for event in port.events)
print("refused")
"""


def test_hi_123_a_stopped_peer_that_goes_on_after_its_replacement_is_stale(house: House) -> None:
    limits = PortLimits(heartbeat_ms=50, heartbeat_timeout_ms=200)
    engine, endpoint = house.port(limits=limits, schema="of the test")
    pump = Pump(engine)
    process = subprocess.Popen([sys.executable, "-c", STOPPED_PEER, endpoint], stdout=subprocess.PIPE, text=True)
    try:
        pump.until(lambda: len(pump.numbers(engine)) > 10)
        os.kill(process.pid, signal.SIGSTOP)
        engine.expect("edge 0", 2)
        replacement = house.raw(endpoint, incarnation=2)
        replacement.greet(pump, schema="of the test")
        before = len(pump.numbers(engine))
        replacement.say(1, cancel(10**6))
        pump.until(lambda: len(pump.numbers(engine)) > before)
        os.kill(process.pid, signal.SIGCONT)
        pump.until(lambda: process.poll() is not None)  # it was told, and ended
        assert process.stdout is not None and process.stdout.read() == "refused\n"
        assert pump.numbers(engine)[before:] == [10**6]
        assert engine.counters["stale_incarnation"] >= 1
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_hi_123_a_stopped_peer_is_lost_at_the_heartbeat_limit(house: House) -> None:
    child = """
import sys
from octavo.actors.runtime.port import Port
from octavo.messages.request import CancelRequest
port = Port("engine", 1, allowed={"edge": [CancelRequest]}, schema="of the test")
port.bind(sys.argv[1])
while True:
    port.wait(-1)
    port.receive()
"""
    endpoint = f"ipc://{house.folder}/stopped"
    edge, _ = house.port("edge 0", limits=PortLimits(heartbeat_ms=50, heartbeat_timeout_ms=200), schema="of the test")
    process = subprocess.Popen([sys.executable, "-c", child, endpoint])
    try:
        edge.connect("engine", 1, endpoint)
        pump = Pump(edge)
        pump.until(lambda: edge.is_up("engine"))
        os.kill(process.pid, signal.SIGSTOP)
        pump.until(lambda: ("engine", "lost") in pump.events["edge 0"])
        assert not edge.is_up("engine")
        os.kill(process.pid, signal.SIGCONT)
        pump.until(lambda: edge.is_up("engine"))  # nobody replaced it: it may go on
    finally:
        process.kill()
        process.wait()


def test_a_line_that_is_closed_and_opened_again_goes_on_with_what_is_sent_from_then(house: House) -> None:
    engine, endpoint = house.port()
    edge, _ = house.port("edge 0")
    edge.connect("engine", 1, endpoint)
    pump = Pump(engine, edge)
    edge.send("engine", cancel(1))
    pump.until(lambda: pump.numbers(engine) == [1])
    edge.disconnect("engine")
    edge.disconnect("engine")
    edge.connect("engine", 1, endpoint)
    edge.send("engine", cancel(2))
    pump.until(lambda: pump.numbers(engine) == [1, 2])


def test_a_port_serves_no_more_peers_than_its_limit(house: House) -> None:
    engine, endpoint = house.port(limits=PortLimits(max_peers=2))
    pump = Pump(engine)
    peers = [house.raw(endpoint, name=f"edge {number}") for number in range(3)]
    for peer in peers[:2]:
        peer.greet(pump)
    peers[2].hello()
    _, body = peers[2].await_answer(pump, envelope.REFUSE)
    assert envelope.decode_refuse(body).code == "full"


def test_a_peer_that_is_forgotten_leaves_nothing_and_names_that_are_ever_new_are_not_too_many(house: House) -> None:
    engine, endpoint = house.port(limits=PortLimits(max_peers=4))
    pump = Pump(engine)
    reception = engine._reception
    before = num_descriptors()
    for number in range(20):
        name = f"edge {number}"
        there, there_at = house.port(name, peers=("engine",))
        engine.vouch(name, "")
        engine.connect(name, 1, there_at)
        there.connect("engine", 1, endpoint)
        there.send("engine", cancel(number))
        both = Pump(engine, there)
        both.until(lambda: both.numbers(engine) == [number] and engine.is_up(name))  # noqa: B023  # at once
        assert not engine.forget(name), "it is connected"
        there.send("engine", cancel(1000 + number))
        both.until(lambda: both.numbers(engine) == [number, 1000 + number])  # noqa: B023  # at once
        there.close()
        pump.until(lambda: engine.forget(name))  # noqa: B023  # once the news of its end has come
    assert engine.forget("edge 99"), "of whom nothing is known"
    assert not (engine._lines.by_peer or engine._lines._sessions or reception._incoming or reception.by_routing_id)
    assert not (reception._keys_of or reception._claims._announced or reception._claims._aside)
    pump.until(lambda: num_descriptors() <= before + 1)  # the waker


def test_a_peer_that_was_forgotten_and_comes_back_is_somebody_new(house: House) -> None:
    engine, endpoint = house.port()
    engine.expect("edge 0", 5)
    first = house.raw(endpoint, incarnation=5)
    pump = Pump(engine)
    first.greet(pump)
    first.say(1, cancel(1))
    pump.until(lambda: pump.numbers(engine) == [1])
    first.close()
    pump.until(lambda: engine.forget("edge 0"))
    again = house.raw(endpoint, incarnation=4)
    assert again.greet(pump) == 1
    again.say(1, cancel(2))
    pump.until(lambda: pump.numbers(engine) == [1, 2])


def test_a_blocking_process_wakes_for_a_grant_that_was_held_back(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteppedClock()
    monkeypatch.setattr("octavo.actors.runtime.port.time", clock)
    engine, endpoint = house.port(limits=PortLimits(window=8, max_messages_per_s=10, burst_s=0.01))
    raw = house.raw(endpoint)
    pump = Pump(engine)
    raw.greet(pump)
    for number in range(1, 9):
        raw.say(number, cancel(number))
    pump.until(lambda: len(pump.numbers(engine)) == 8 and engine.counters["held_back"] == 1)
    while engine.wait(0):  # what is left of the arrivals
        engine.receive()
    assert not engine.wait(0) and not raw.answers()
    clock.now_ns += 10**9
    assert engine.wait(0) and engine.wait(-1), "nothing came, and yet there is something to do"
    engine.receive()
    pump.until(lambda: any(kind == envelope.GRANT for kind, _, _ in raw.answers()))


def test_closing_a_port_removes_its_socket(house: House) -> None:
    engine, endpoint = house.port()
    path = Path(endpoint.removeprefix("ipc://"))
    assert path.is_socket() and path.stat().st_mode & 0o777 == 0o600
    engine.close()
    assert not path.exists()


def test_only_what_was_asked_for_may_be_heard_even_from_a_known_peer() -> None:
    port = Port("engine", 1, allowed={"edge": [CancelRequest], "edge 7": [StopMatched]})
    try:
        assert port._reception._allowed["edge 7"] == (StopMatched,)
    finally:
        port.close()
