from __future__ import annotations

from array import array

import msgspec
import pytest

from octavo.actors.journal.config import JournalHeader
from octavo.actors.journal.core import FLUSH_RECORDS, JournalCore, Unheard
from octavo.actors.journal.records import MAX_UNHEARD, Raised, Record
from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.kv import ReleaseMatch
from octavo.messages.request import SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import PlanDue, StepExecuted

HEADER = JournalHeader(
    start_ns=1000,
    scheduler=SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32),
    allocator=AllocatorConfig(num_blocks=8, block_size=4),
)


class Recorded:
    """A journal in memory."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.faults: list[str] = []
        self.core = JournalCore(HEADER, self.payloads.append, on_fault=self.faults.append)
        self.num_handled = 0
        self.handle = self.core.wrap_scheduler(self._handle)

    def _handle(self, message: object, now_ns: int) -> list[object]:
        self.num_handled += 1
        return []

    def records(self) -> list[object]:
        return [record for payload in self.payloads[1:] for record in msgspec.msgpack.decode(payload)]


def request_of(num_tokens: int) -> SubmitRequest:
    return SubmitRequest(RequestId(1), array("i", range(num_tokens)).tobytes(), SamplingParams(), arrival_ns=900)


def test_what_comes_with_every_step_takes_a_byte_or_little_more() -> None:
    recorded = Recorded()
    for now_ns in (1000, 1000, 1100, 1100):
        recorded.handle(PlanDue(), now_ns)
    recorded.core.flush()
    assert recorded.records() == [-1, -1, 100, -1, -1]
    assert len(recorded.payloads[1]) == 6


def test_a_fault_in_recording_ends_the_journal_and_not_the_engine() -> None:
    recorded = Recorded()
    recorded.handle(PlanDue(), 2000)
    recorded.handle(PlanDue(), 1999)  # no clock does this
    recorded.handle(PlanDue(), 2001)
    assert recorded.num_handled == 3
    assert recorded.faults == ["the clock went back by 1 ns"]
    assert recorded.records() == [1000, -1, [12, "the clock went back by 1 ns"]]
    recorded.core.end()
    assert len(recorded.payloads) == 2, "nothing follows the end"


def test_a_message_nobody_knows_ends_the_journal_and_not_the_engine() -> None:
    recorded = Recorded()
    recorded.handle(ReleaseMatch(Epoch(0), RequestId(1)), 1000)
    assert recorded.num_handled == 1
    assert len(recorded.faults) == 1


def test_a_sink_that_fails_ends_the_journal_and_not_the_engine() -> None:
    faults: list[str] = []
    is_full = False

    def emit(payload: bytes) -> None:
        if is_full:
            raise BufferError("the disk is behind")

    core = JournalCore(HEADER, emit, on_fault=faults.append)
    handle = core.wrap_scheduler(lambda message, now_ns: [])
    is_full = True
    for _ in range(2 * FLUSH_RECORDS):
        assert handle(PlanDue(), 1000) == []
    assert faults == ["the disk is behind"]


def test_an_exception_of_the_core_is_recorded_and_goes_on_up() -> None:
    recorded = Recorded()

    def raise_error(message: object, now_ns: int) -> list[object]:
        raise KeyError("no such block")

    with pytest.raises(KeyError):
        recorded.core.wrap_allocator(raise_error)(ReleaseMatch(Epoch(0), RequestId(1)), 1000)
    recorded.core.end()
    decoded = msgspec.msgpack.decode(recorded.payloads[1], type=list[Record])
    assert decoded[1] == Raised("KeyError")


def test_frames_are_handed_on_by_number_size_and_age() -> None:
    by_number, by_size, by_age = Recorded(), Recorded(), Recorded()
    for _ in range(FLUSH_RECORDS):
        by_number.handle(PlanDue(), 1000)
    assert len(by_number.payloads) == 2
    for _ in range(2):
        by_size.handle(request_of(250_000), 1000)
    assert len(by_size.payloads) == 3
    by_age.handle(PlanDue(), 1000)
    by_age.core.flush_if_due(1_000_000_999)
    assert len(by_age.payloads) == 1
    by_age.core.flush_if_due(1_000_001_000)
    assert len(by_age.payloads) == 2
    by_age.core.flush_if_due(9_000_000_000)
    assert len(by_age.payloads) == 2, "nothing is nothing"


def test_tokens_of_a_late_step_do_not_count() -> None:
    recorded = Recorded()
    recorded.handle(request_of(3), 1000)
    late = StepExecuted(Epoch(0), StepId(5), (RequestId(1),), (7,))
    recorded.handle(late, 1000)
    recorded.core.flush()
    assert recorded.records()[-1] == [3, 0, 5, [1]]


def test_messages_under_way_are_remembered_up_to_a_bound() -> None:
    unheard = Unheard()
    messages = [ReleaseMatch(Epoch(0), RequestId(i)) for i in range(MAX_UNHEARD + 2)]
    for message in messages:
        unheard.say(message)
    assert len(unheard) == MAX_UNHEARD
    assert unheard.find(messages[1]) == -1
    assert unheard.find(messages[2]) == 0
    assert unheard.find(messages[5]) == 3
    assert unheard.take(3) is messages[5]
    assert unheard.take(0) is messages[2]
    assert unheard.find(messages[4]) == 1
