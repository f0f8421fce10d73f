"""The line from an edge to an engine, with a port that only remembers."""

from __future__ import annotations

from typing import Any

import msgspec
from fake_carrier import FakeCarrier

from octavo.actors.scheduler.quarantine import Quarantine
from octavo.gateway.engine_link import EngineLink, FromEngine, summed
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.processes import EngineReport, RememberQuarantined
from octavo.messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StepExecuted
from octavo.messages.system import Drain


def submit(request_id: int, tokens: bytes = b"\1\0\0\0", **fields: Any) -> SubmitRequest:
    return SubmitRequest(RequestId(request_id), tokens, SamplingParams(max_tokens=9, seed=1), **fields)


def step(*rows: tuple[int, int], epoch: int = 0) -> StepExecuted:
    ids, tokens = zip(*rows, strict=True)
    return StepExecuted(Epoch(epoch), StepId(0), tuple(map(RequestId, ids)), tokens)


def report(incarnation: int, num_steps: int) -> EngineReport:
    return EngineReport(incarnation, 3, 0, 7, 10, 0, 0, 0, 0, 0, num_steps, 0, 0, 0)


class Rig:
    """A link to the first incarnation of an engine, which is up."""

    def __init__(self, quarantine: Quarantine | None = None) -> None:
        self.carrier = FakeCarrier()
        self.delivered: list[FromEngine] = []
        self.num_stuck = 0
        self.link = EngineLink(
            "engine",
            self.carrier,  # type: ignore[arg-type]  # has what is used of it
            "/run",
            deliver=self.delivered.append,
            on_stuck=self._note_stuck,
            quarantine=quarantine,
        )
        self.link.connect(1)
        self.link.is_up = True

    def _note_stuck(self) -> None:
        self.num_stuck += 1

    def replace(self, incarnation: int, epoch: int) -> None:
        self.link.connect(incarnation)
        self.link.is_up = True
        self.link.resubmit(Epoch(epoch), "died")


def test_what_is_posted_while_no_engine_is_up_reaches_the_next_one() -> None:
    rig = Rig()
    rig.link.post(submit(1))
    rig.link.take(step((1, 5)))
    rig.link.connect(2)
    rig.link.post(submit(2))
    rig.link.post(CancelRequest(RequestId(1)))
    rig.link.post(submit(3))
    rig.link.post(StopMatched(RequestId(3)))
    assert rig.carrier.take_sent("engine") == [submit(1)]
    rig.replace(2, epoch=1)
    again = rig.carrier.take_sent("engine")
    assert [getattr(message, "request_id", None) for message in again] == [1, 2, 3, 1, 3]
    assert again[0] == submit(1, output_token_ids=b"\5\0\0\0", is_taken_up_again=True)
    assert again[3:] == [CancelRequest(RequestId(1)), StopMatched(RequestId(3))]


def test_an_engine_that_takes_no_more_is_reported_once_and_told_nothing_behind_what_it_missed() -> None:
    rig = Rig()
    rig.carrier.is_full = True
    rig.link.post(submit(1))
    rig.carrier.is_full = False
    rig.link.post(CancelRequest(RequestId(1)))
    rig.link.post(submit(2))
    assert rig.num_stuck == 1
    assert rig.carrier.sent == []
    rig.replace(2, epoch=1)
    assert len(rig.carrier.take_sent("engine")) == 3


def test_a_request_that_no_message_can_hold_is_refused_and_the_engine_left_alone() -> None:
    rig = Rig()
    rig.carrier.unsendable = [submit(1)]
    rig.link.post(submit(1))
    (ended,) = rig.delivered
    assert isinstance(ended, RequestEnded)
    assert (ended.reason, ended.error_code, ended.error) == ("refused", "invalid_request", "it is too long")
    assert rig.num_stuck == 0 and rig.link.ledger.num_live == 0
    rig.link.post(submit(2))
    assert rig.carrier.take_sent("engine") == [submit(2)]


def test_what_engines_found_to_be_poison_their_successors_hear_before_any_request() -> None:
    rig = Rig()
    rig.link.post(submit(1))
    rig.link.post(submit(2, tokens=b"\2\0\0\0"))
    rig.link.take(RequestEnded(RequestId(1), "error", error_code="request_quarantined", error="it kills"))
    rig.link.take(RequestEnded(RequestId(2), "refused", error_code="request_quarantined"))  # known already
    rig.carrier.sent.clear()
    rig.link.post(submit(3, tokens=b"\3\0\0\0"))
    rig.carrier.sent.clear()
    rig.replace(2, epoch=1)
    first, second = rig.carrier.take_sent("engine")
    assert isinstance(first, RememberQuarantined) and isinstance(second, SubmitRequest)
    quarantine = Quarantine()
    quarantine.remember(first)
    now_ns = first.until_ns - 1
    assert quarantine.holds(submit(9), now_ns)
    assert not quarantine.holds(submit(9, tokens=b"\2\0\0\0"), now_ns)
    assert not quarantine.holds(submit(9), first.until_ns)


def test_totals_go_on_counting_over_engines_and_gauges_are_of_the_last() -> None:
    rig = Rig()
    rig.link.take(report(1, 100))
    rig.replace(2, epoch=1)
    rig.link.take(report(2, 7))
    rig.link.take(report(2, 9))
    assert rig.link.total("num_steps") == 109
    rig.link.give_up()
    assert rig.link.total("num_steps") == 109
    assert rig.link.report is None


def test_steps_of_all_engines_are_counted_by_their_size() -> None:
    rig = Rig()
    assert rig.link.step_sizes == ()
    rig.link.take(msgspec.structs.replace(report(1, 5), step_sizes=(1, 0, 4), step_tokens=12))
    rig.replace(2, epoch=1)
    assert rig.link.step_sizes == (1, 0, 4)
    for sizes, num_tokens in (((0, 1, 0), 2), ((2, 3, 0), 8)):
        rig.link.take(msgspec.structs.replace(report(2, 5), step_sizes=sizes, step_tokens=num_tokens))
    assert rig.link.step_sizes == (3, 3, 4) and rig.link.total("step_tokens") == 20
    rig.link.give_up()
    assert rig.link.step_sizes == (3, 3, 4) and rig.link.total("step_tokens") == 20
    assert summed() == () == summed((), ()) and summed((1, 2), (), (3, 4)) == (4, 6)


def test_an_engine_that_drains_has_a_successor_that_drains() -> None:
    rig = Rig()
    rig.link.post(Drain())
    rig.carrier.sent.clear()
    rig.replace(2, epoch=1)
    assert rig.carrier.take_sent("engine") == [Drain()]


def test_nothing_counts_that_an_engine_says_after_its_requests_went_elsewhere() -> None:
    rig = Rig()
    rig.link.post(submit(1))
    rig.link.post(submit(2))
    rig.link.post(CancelRequest(RequestId(2)))
    rig.link.take(step((1, 5), (2, 6)))
    rig.delivered.clear()
    again = rig.link.give_up()
    assert [type(message) for message in again] == [SubmitRequest, SubmitRequest, CancelRequest]
    rig.link.take(step((1, 7)))  # was on its way when its executor died
    rig.link.take(RequestEnded(RequestId(2), "abort"))
    assert rig.delivered == []
