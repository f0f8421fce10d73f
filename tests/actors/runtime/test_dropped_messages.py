"""F-26, F-28: whatever kind of message vanishes on its way, or comes too early, is sent again, once, in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from port_tools import Pump, RawPeer, cancel, open_port

from octavo.actors.runtime import envelope
from octavo.actors.runtime.port import Port
from octavo.actors.runtime.sample_messages import sample_messages
from octavo.actors.runtime.schema import all_messages
from octavo.actors.runtime.wire import Encoder
from octavo.messages.base import Message

KINDS = all_messages()
PLAIN = [each for each in sample_messages() if type(each) in KINDS and not Encoder().encode(each)[1]]
"""Messages of every kind that goes between processes, with and without something in their fields."""


@pytest.fixture
def link(tmp_path: Path) -> Iterator[tuple[Port, RawPeer, Pump]]:
    tmp_path.chmod(0o700)
    port = open_port(hears=KINDS)
    raw = RawPeer(port.bind(f"ipc://{tmp_path}/engine.1"))
    pump = Pump(port)
    raw.greet(pump)
    yield port, raw, pump
    raw.close()
    port.close()


def await_number(pump: Pump, number: int) -> None:
    """Until so many messages have been heard."""
    pump.until(lambda: len(heard(pump)) >= number)


def heard(pump: Pump) -> list[Message]:
    return [message for _, message in pump.received["engine"]]


def test_there_is_a_message_of_every_kind() -> None:
    assert {type(message) for message in PLAIN} == set(KINDS)


def test_f_26_a_message_of_any_kind_that_vanishes_is_asked_for_again_and_comes_in_its_place(
    link: tuple[Port, RawPeer, Pump],
) -> None:
    port, raw, pump = link
    sequence = 1
    expected: list[Message] = []
    for message in PLAIN:
        before, behind = cancel(2 * sequence), cancel(2 * sequence + 1)
        raw.say(sequence, before)
        raw.say(sequence + 2, behind)  # the one between them is lost
        asked_for, _ = raw.await_answer(pump, envelope.RESET)
        assert asked_for == sequence + 1
        expected.append(before)
        assert heard(pump) == expected, "what came behind the gap does not count"
        assert raw.greet(pump) == sequence + 1
        raw.say(sequence + 1, message)
        raw.say(sequence + 2, behind)
        expected += [message, behind]
        await_number(pump, len(expected))
        assert heard(pump) == expected
        sequence += 3
    assert port.counters["gap"] == len(PLAIN)


def test_f_28_a_message_of_any_kind_that_overtakes_another_is_heard_behind_it(
    link: tuple[Port, RawPeer, Pump],
) -> None:
    _, raw, pump = link
    sequence = 1
    expected: list[Message] = []
    for message in PLAIN:
        first = cancel(sequence)
        raw.say(sequence + 1, message)
        raw.say(sequence, first)
        raw.await_answer(pump, envelope.RESET)
        assert heard(pump) == expected, "neither counts: the line begins anew where it was cut"
        assert raw.greet(pump) == sequence
        raw.say(sequence, first)
        raw.say(sequence + 1, message)
        expected += [first, message]
        await_number(pump, len(expected))
        assert heard(pump) == expected
        sequence += 2
