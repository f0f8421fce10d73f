"""The line from an edge to an engine, with a port that only remembers."""

from __future__ import annotations

from typing import Any

import msgspec
from fake_carrier import FakeCarrier

from octavo.actors.scheduler.quarantine import Quarantine
from octavo.gateway.processes.engine_link import EngineLink, FromEngine, summed
from octavo.gateway.processes.shed_edge import take_up_again
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.processes import EdgeShed, EngineFailed, EngineReport, RememberQuarantined, ShedHeard
from octavo.messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest, TokenLogprobs
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StepExecuted
from octavo.messages.system import Drain


def submit(request_id: int, tokens: bytes = b"\1\0\0\0", **fields: Any) -> SubmitRequest:
    return SubmitRequest(RequestId(request_id), tokens, SamplingParams(max_tokens=9, seed=1), **fields)


def step(*rows: tuple[int, int], epoch: int = 0) -> StepExecuted:
    ids, tokens = zip(*rows, strict=True) if rows else ((), ())
    return StepExecuted(Epoch(epoch), StepId(0), tuple(map(RequestId, ids)), tokens)


def report(incarnation: int, num_steps: int, num_in_flight: int = 0) -> EngineReport:
    return EngineReport(incarnation, 3, 0, 7, 10, 0, 0, 0, 0, 0, num_steps, num_in_flight, 0, 0)


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


def test_what_engines_accepted_is_over_or_lives_or_was_lost_with_them_at_every_moment() -> None:
    rig = Rig()

    def check(num_live: int, num_lost: int) -> None:
        link = rig.link
        num_over = sum(link.total(name) for name in ("num_completed", "num_failed", "num_cancelled"))
        assert link.num_lost == num_lost
        assert link.total("num_accepted") == num_over + num_live + num_lost

    ended = {"num_completed": 5, "num_failed": 1, "num_cancelled": 2}
    rig.link.take(msgspec.structs.replace(report(1, 100), num_waiting=4, num_accepted=15, **ended))
    check(7, 0)
    rig.replace(2, epoch=1)
    check(7, 0)
    rig.link.take(msgspec.structs.replace(report(2, 0), num_running=0))
    check(0, 7)
    rig.link.take(msgspec.structs.replace(report(2, 9), num_accepted=7, num_completed=4))
    check(3, 7)
    rig.link.give_up()
    check(0, 10)


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


def relieved() -> Rig:
    """A link whose requests 1 and 2 have moved, and whose request 3 came later."""
    rig = Rig()
    rig.link.post(submit(1))
    rig.link.post(submit(2))
    rig.link.take(step((1, 5)))
    rig.delivered.clear()
    moved = rig.link.relieve()
    assert [(message.request_id, message.num_losses) for message in moved if isinstance(message, SubmitRequest)] == [
        (1, 1),
        (2, 1),
    ]
    sent = rig.carrier.take_sent("engine")
    assert sent[2:] == [CancelRequest(RequestId(1)), CancelRequest(RequestId(2))]
    rig.link.post(submit(3))
    rig.carrier.sent.clear()
    return rig


def test_of_what_has_moved_an_engine_that_lives_can_say_nothing_more() -> None:
    rig = relieved()
    late = StepExecuted(
        Epoch(0),
        StepId(1),
        (RequestId(1), RequestId(3)),
        (6, 7),
        stopped=(RequestId(1),),
        logprobs=((RequestId(1), TokenLogprobs(6, -1.0, 1)), (RequestId(3), TokenLogprobs(7, -1.0, 1))),
        prompt_logprobs=((RequestId(2), 0, ()), (RequestId(3), 0, ())),
        failed=((RequestId(2), "why"),),
        nonfinite=(RequestId(2),),
    )
    rig.link.take(late)
    rig.link.take(RequestEnded(RequestId(1), "abort"))
    assert rig.delivered == [
        StepExecuted(
            Epoch(0),
            StepId(1),
            (RequestId(3),),
            (7,),
            logprobs=((RequestId(3), TokenLogprobs(7, -1.0, 1)),),
            prompt_logprobs=((RequestId(3), 0, ()),),
        )
    ]


def test_a_step_that_was_planned_before_a_moved_request_ended_brings_no_token_of_it_however_late() -> None:
    rig = relieved()
    rig.link.take(RequestEnded(RequestId(1), "abort"))
    rig.link.take(report(1, num_steps=8, num_in_flight=2))
    rig.link.take(step((1, 6), (3, 7)))
    rig.link.take(report(1, num_steps=9, num_in_flight=2))  # one of the eight is still under way
    rig.link.take(step((1, 6), (3, 8)))
    assert rig.delivered == [step((3, 7)), step((3, 8))]
    rig.link.take(report(1, num_steps=10, num_in_flight=2))
    rig.link.take(RequestEnded(RequestId(2), "abort"))
    rig.link.take(report(1, num_steps=10))
    assert len(rig.link._moved) == 0, "what nobody can speak of any more is not looked for"
    rig.link.take(whole := step((3, 9)))
    assert rig.delivered[-1] is whole


def test_nothing_of_what_has_moved_is_said_to_the_engine_that_comes_next_nor_held_against_it() -> None:
    rig = relieved()
    rig.replace(2, epoch=1)
    assert [message.request_id for message in rig.carrier.take_sent("engine")] == [3]  # type: ignore[attr-defined]
    rig.link.post(submit(1))  # the other engine is gone
    rig.link.take(step((1, 6), epoch=1))
    assert rig.delivered == [step((1, 6), epoch=1)]
    assert rig.num_stuck == 0


def test_what_moved_while_no_engine_was_up_the_next_one_has_never_heard_of() -> None:
    rig = Rig()
    rig.link.post(submit(1))
    rig.link.connect(2)
    assert rig.link.relieve()
    rig.carrier.sent.clear()
    rig.link.is_up = True
    rig.link.resubmit(Epoch(1), "died")
    rig.link.post(submit(1))
    assert rig.carrier.take_sent("engine") == [submit(1)]
    rig.link.take(step((1, 6), epoch=1))
    assert len(rig.delivered) == 1 and rig.num_stuck == 0


def test_an_engine_that_sheds_this_edge_has_forgotten_what_moved() -> None:
    rig = relieved()
    take_up_again(rig.link, EdgeShed(1, 7))
    heard, again = rig.carrier.take_sent("engine")
    assert heard == ShedHeard(7) and isinstance(again, SubmitRequest) and again.request_id == 3
    rig.link.post(submit(1))
    rig.link.take(step((1, 6)))
    assert rig.delivered == [step((1, 6))]


def test_an_engine_that_is_given_a_request_back_while_it_may_speak_of_the_old_one_is_replaced() -> None:
    rig = relieved()
    rig.link.post(submit(1, output_token_ids=b"\5\0\0\0", num_losses=1))
    assert rig.num_stuck == 1 and rig.carrier.take_sent("engine") == []
    rig.link.take(step((1, 6)))  # of the old one
    assert rig.delivered == [step()]
    rig.replace(2, epoch=1)
    again = [message for message in rig.carrier.take_sent("engine") if isinstance(message, SubmitRequest)]
    assert {message.request_id: message.output_token_ids for message in again} == {3: b"", 1: b"\5\0\0\0"}
    rig.link.take(step((1, 6), epoch=1))
    assert rig.delivered[-1] == step((1, 6), epoch=1)


def test_f_20_what_engines_raise_at_twice_is_ended_and_their_successors_are_warned() -> None:
    rig = Rig()
    warnings: list[RememberQuarantined] = []
    rig.link.on_convicted = warnings.append
    rig.link.post(submit(1))
    rig.link.post(submit(2, tokens=b"\2\0\0\0"))
    rig.link.take(EngineFailed(1, RequestId(1), "RuntimeError"))
    rig.replace(2, epoch=1)
    rig.link.take(EngineFailed(1, RequestId(1), "RuntimeError"))  # heard already
    assert rig.delivered == []
    rig.link.take(EngineFailed(2, RequestId(1), "RuntimeError"))
    (ended,) = rig.delivered
    assert isinstance(ended, RequestEnded) and (ended.reason, ended.error_code) == ("error", "request_quarantined")
    rig.carrier.sent.clear()
    rig.replace(3, epoch=2)
    entry, again = rig.carrier.take_sent("engine")
    assert rig.link.total("num_quarantined") == 1
    assert [entry] == warnings and isinstance(again, SubmitRequest) and again.request_id == 2
    quarantine = Quarantine()
    quarantine.remember(warnings[0])
    assert quarantine.holds(submit(9), warnings[0].until_ns - 1)
