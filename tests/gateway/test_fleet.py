"""Several replicas behind an edge, with ports that only remember."""

from __future__ import annotations

from typing import Any

from fake_carrier import FakeCarrier

from octavo.actors.scheduler.quarantine import Quarantine
from octavo.gateway.engine_link import EngineLink, FromEngine
from octavo.gateway.fleet import Fleet
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.kv import ResetPrefixCache
from octavo.messages.processes import RememberQuarantined
from octavo.messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StepExecuted


def submit(request_id: int, **fields: Any) -> SubmitRequest:
    return SubmitRequest(RequestId(request_id), b"\1\0\0\0", SamplingParams(max_tokens=9, seed=1), **fields)


class Rig:
    """A fleet of engines that are up, and what reached the edge."""

    def __init__(self, num_replicas: int) -> None:
        self.carrier = FakeCarrier()
        self.delivered: list[FromEngine] = []
        carrier: Any = self.carrier  # has what is used of it
        quarantine = Quarantine()
        self.links = [
            EngineLink(f"engine {index}", carrier, "/run", deliver=self._deliver, quarantine=quarantine)
            for index in range(num_replicas)
        ]
        for link in self.links:
            link.connect(1)
            link.is_up = True
        self.fleet = Fleet(self.links, "round_robin")

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, RequestEnded):
            self.fleet.note_end(message)
        self.delivered.append(message)

    def sent(self, index: int) -> list[Any]:
        return self.carrier.take_sent(f"engine {index}")


def test_what_a_lost_replica_had_goes_on_elsewhere_with_its_tokens_cancels_and_stops() -> None:
    rig = Rig(2)
    for request_id in (0, 1, 2, 4, 6):  # by turns, but that siblings stay together
        rig.fleet.post(submit(request_id, fork_of=RequestId(0 if request_id else -1)))
    assert [message.request_id for message in rig.sent(0)] == [0, 1, 2, 4, 6]
    rig.links[0].take(StepExecuted(Epoch(0), StepId(0), (RequestId(0),), (5,)))
    rig.fleet.post(CancelRequest(RequestId(1)))
    rig.fleet.post(StopMatched(RequestId(2)))
    assert rig.fleet.abandon(0)
    messages = rig.sent(1)
    assert [message.request_id for message in messages] == [0, 1, 2, 4, 6, 1, 2]
    assert messages[0].output_token_ids == b"\5\0\0\0"
    assert [type(message) for message in messages[5:]] == [CancelRequest, StopMatched]
    rig.fleet.post(CancelRequest(RequestId(4)))
    assert rig.sent(1) == [CancelRequest(RequestId(4))]


def test_the_late_words_of_a_lost_replica_repeat_no_token() -> None:
    rig = Rig(2)
    rig.fleet.post(submit(0))
    assert rig.fleet.abandon(0)
    rig.links[0].take(StepExecuted(Epoch(0), StepId(0), (RequestId(0),), (5,)))
    assert rig.delivered == []
    rig.links[1].take(StepExecuted(Epoch(0), StepId(0), (RequestId(0),), (5,)))
    assert len(rig.delivered) == 1


def test_a_replica_may_be_lost_while_the_last_other_one_is_being_replaced() -> None:
    rig = Rig(2)
    rig.fleet.post(submit(0))
    rig.fleet.post(submit(1))
    rig.links[1].connect(2)
    rig.fleet.set_up(1, is_up=False)
    assert rig.fleet.abandon(0), "the other one will be back"
    rig.fleet.post(submit(2))
    rig.carrier.sent.clear()
    rig.links[1].is_up = True
    rig.links[1].resubmit(Epoch(1), "died")
    assert [message.request_id for message in rig.sent(1)] == [1, 0, 2]
    assert rig.sent(0) == []


def test_a_lost_replica_is_never_up_again_and_the_last_one_leaves_nowhere_to_go() -> None:
    rig = Rig(2)
    assert rig.fleet.abandon(0)
    assert rig.fleet.abandon(0), "told twice, it is still gone"
    rig.fleet.set_up(0, is_up=True)
    for request_id in range(4):
        rig.fleet.post(submit(request_id))
    assert rig.sent(0) == [] and len(rig.sent(1)) == 4
    assert not rig.fleet.abandon(1)


def test_what_is_about_no_request_reaches_every_replica_that_is_up() -> None:
    rig = Rig(3)
    rig.links[1].is_up = False
    rig.fleet.post(ResetPrefixCache())
    assert [rig.sent(index) for index in range(3)] == [[ResetPrefixCache()], [], [ResetPrefixCache()]]


def test_what_one_replica_found_to_be_poison_the_others_hear_before_any_further_request() -> None:
    rig = Rig(4)
    rig.fleet.post(submit(0))
    rig.links[2].connect(2)  # is being replaced
    assert rig.fleet.abandon(3)
    rig.carrier.sent.clear()
    rig.links[0].take(RequestEnded(RequestId(0), "error", error_code="request_quarantined", error="it kills"))
    for request_id in (4, 8):  # the client asks again
        rig.fleet.post(submit(request_id))
    assert rig.sent(0) == [], "it knows, and it is not its turn"
    entry, again = rig.sent(1)
    assert isinstance(entry, RememberQuarantined) and isinstance(again, SubmitRequest)
    quarantine = Quarantine()
    quarantine.remember(entry)
    assert quarantine.holds(again, entry.until_ns - 1)
    assert rig.sent(2) == [] and rig.sent(3) == []
    rig.links[2].is_up = True
    rig.links[2].resubmit(Epoch(1), "died")
    first, *others = rig.sent(2)
    assert first == entry and [message.request_id for message in others] == [8]


def test_a_replica_that_only_refused_what_another_had_found_to_be_poison_tells_nobody() -> None:
    rig = Rig(2)
    rig.fleet.post(submit(0))
    rig.carrier.sent.clear()
    rig.links[0].take(RequestEnded(RequestId(0), "refused", error_code="request_quarantined"))
    assert rig.sent(1) == []
