"""Several replicas behind an edge, with ports that only remember."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_carrier import FakeCarrier

from octavo.actors.ledger.core import LedgerCore
from octavo.actors.router.core import RouterCore
from octavo.actors.scheduler.quarantine import Quarantine
from octavo.gateway.processes.engine_link import EngineLink, FromEngine
from octavo.gateway.processes.fleet import RELIEF_S, Fleet
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.kv import ResetPrefixCache
from octavo.messages.processes import RememberQuarantined
from octavo.messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StepExecuted


def submit(request_id: int, **fields: Any) -> SubmitRequest:
    return SubmitRequest(RequestId(request_id), b"\1\0\0\0", SamplingParams(max_tokens=9, seed=1), **fields)


class Timers:
    """A loop's `call_later`, for a test that says when time has passed."""

    class Timer:
        def __init__(self, callback: Callable[[], None]) -> None:
            self.callback = callback
            self.is_pending = True

        def cancel(self) -> None:
            self.is_pending = False

    def __init__(self) -> None:
        self._timers: list[Timers.Timer] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timers.Timer:
        assert delay_s == RELIEF_S
        self._timers.append(self.Timer(callback))
        return self._timers[-1]

    @property
    def num_pending(self) -> int:
        return sum(timer.is_pending for timer in self._timers)

    def pass_time(self) -> None:
        """So long that each timer that is pending now runs."""
        due = [timer for timer in self._timers if timer.is_pending]
        self._timers = []
        for timer in due:
            if timer.is_pending:  # and was not cancelled by one before
                timer.is_pending = False
                timer.callback()


class Rig:
    """A fleet of engines that are up, and what reached the edge."""

    def __init__(self, num_replicas: int) -> None:
        self.timers = Timers()
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
        self.fleet = Fleet(self.links, "round_robin", call_later=self.timers.call_later)

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
    rig.fleet.post(submit(9))
    assert rig.fleet._router.num_open == 4, "it was being tokenized still, and is nobody's"


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
    rig.fleet.post(submit(4))  # the client asks again
    refused = rig.delivered[-1]
    assert isinstance(refused, RequestEnded)
    assert (refused.request_id, refused.reason, refused.error_code) == (4, "refused", "request_quarantined")
    for request_id in (5, 6, 8):
        rig.fleet.post(submit(request_id, cache_salt="another"))
    assert [message.request_id for message in rig.sent(0)] == [6], "it knows"
    entry, again = rig.sent(1)
    assert isinstance(entry, RememberQuarantined) and again.request_id == 8
    quarantine = Quarantine()
    quarantine.remember(entry)
    assert quarantine.holds(submit(9), entry.until_ns - 1) and not quarantine.holds(again, entry.until_ns - 1)
    assert rig.sent(2) == [] and rig.sent(3) == []
    rig.links[2].is_up = True
    rig.links[2].resubmit(Epoch(1), "died")
    first, *others = rig.sent(2)
    assert first == entry and [message.request_id for message in others] == [5]


def test_a_replica_that_only_refused_what_another_had_found_to_be_poison_tells_nobody() -> None:
    rig = Rig(2)
    rig.fleet.post(submit(0))
    rig.carrier.sent.clear()
    rig.links[0].take(RequestEnded(RequestId(0), "refused", error_code="request_quarantined"))
    assert rig.sent(1) == []


def ids_of(messages: list[Any]) -> list[int]:
    return [message.request_id for message in messages if isinstance(message, SubmitRequest)]


def test_what_a_replica_has_that_is_down_for_a_while_goes_on_elsewhere_and_comes_back_to_nobody() -> None:
    rig = Rig(2)
    for request_id in range(4):
        rig.fleet.post(submit(request_id))
    rig.links[0].take(StepExecuted(Epoch(0), StepId(0), (RequestId(0),), (5,)))
    rig.carrier.sent.clear()
    rig.delivered.clear()
    rig.fleet.set_up(0, is_up=False)
    assert rig.carrier.sent == [], "it may be back at once"
    rig.timers.pass_time()
    assert rig.sent(0) == [CancelRequest(RequestId(0)), CancelRequest(RequestId(2))]
    first, second = rig.sent(1)
    assert first == submit(0, output_token_ids=b"\5\0\0\0", is_taken_up_again=True, num_losses=1)
    assert second.request_id == 2
    rig.fleet.set_up(0, is_up=True)
    rig.links[0].take(StepExecuted(Epoch(1), StepId(1), (RequestId(0),), (6,)))
    rig.links[0].take(RequestEnded(RequestId(0), "abort"))
    assert [message for message in rig.delivered if not isinstance(message, StepExecuted) or message.request_ids] == []
    rig.fleet.post(CancelRequest(RequestId(0)))
    assert rig.sent(1) == [CancelRequest(RequestId(0))] and rig.sent(0) == []
    rig.links[1].take(RequestEnded(RequestId(0), "abort"))
    assert rig.delivered[-1] == RequestEnded(RequestId(0), "abort")


def test_a_replica_that_is_back_soon_keeps_what_it_has() -> None:
    rig = Rig(2)
    rig.fleet.post(submit(0))
    rig.carrier.sent.clear()
    rig.fleet.set_up(0, is_up=False)
    rig.fleet.set_up(0, is_up=True)
    assert rig.timers.num_pending == 0
    rig.timers.pass_time()
    assert rig.carrier.sent == []


def test_no_request_moves_a_second_time_so_what_kills_executors_kills_those_of_two_replicas_at_most() -> None:
    rig = Rig(3)
    rig.fleet.post(submit(0))
    rig.fleet.set_up(0, is_up=False)
    rig.timers.pass_time()
    (new,) = [index for index in (1, 2) if ids_of(rig.sent(index)) == [0]]
    rig.fleet.set_up(0, is_up=True)
    rig.fleet.set_up(new, is_up=False)
    rig.carrier.sent.clear()
    rig.timers.pass_time()
    assert rig.carrier.sent == []


def test_with_no_other_replica_up_requests_stay_until_one_is() -> None:
    rig = Rig(2)
    rig.fleet.post(submit(0))
    rig.fleet.set_up(0, is_up=False)
    rig.fleet.set_up(1, is_up=False)
    rig.carrier.sent.clear()
    rig.timers.pass_time()
    assert rig.carrier.sent == []
    rig.fleet.set_up(1, is_up=True)
    rig.timers.pass_time()
    assert ids_of(rig.sent(1)) == [0] and rig.sent(0) == [CancelRequest(RequestId(0))]


def test_a_fleet_that_is_closed_or_whose_lost_replica_is_given_up_waits_for_no_time() -> None:
    rig = Rig(3)
    rig.fleet.post(submit(0))
    rig.fleet.set_up(0, is_up=False)
    assert rig.fleet.abandon(0)
    assert rig.timers.num_pending == 0
    rig.fleet.set_up(1, is_up=False)
    rig.fleet.close()
    assert rig.timers.num_pending == 0
    single = Rig(1)
    single.fleet.set_up(0, is_up=False)
    assert single.timers.num_pending == 0, "there is nowhere to go"


def test_the_router_remembers_no_more_than_the_replicas_caches_have_room_for_twice_and_who_is_down() -> None:
    rig = Rig(2)
    fleet = Fleet(rig.links, "prefix_aware", call_later=rig.timers.call_later)
    fleet.set_up(0, is_up=False)
    fleet.size_caches(256 * 3)
    for request_id in range(40):
        prompt = b"".join(int(request_id * 256 + index).to_bytes(4, "little") for index in range(256))
        fleet.post(SubmitRequest(RequestId(request_id), prompt, SamplingParams(max_tokens=9, seed=1)))
        assert len(fleet._router._prefixes) == min(request_id + 1, 12)
    assert rig.sent(0) == [] and len(rig.sent(1)) == 40


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("raising", ["router", "ledger", "port"])
def test_f_13_a_request_that_cannot_be_carried_ends_and_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, num_replicas: int, raising: str
) -> None:
    rig = Rig(num_replicas)
    where: dict[str, tuple[Any, str]] = {
        "router": (RouterCore, "handle"),
        "ledger": (LedgerCore, "handle"),
        "port": (FakeCarrier, "send"),
    }
    owner, name = where[raising]
    call = getattr(owner, name)

    def call_or_raise(self: Any, *arguments: Any) -> Any:
        if any(isinstance(argument, SubmitRequest) and argument.request_id == 2 for argument in arguments):
            raise ZeroDivisionError("a defect")
        return call(self, *arguments)

    monkeypatch.setattr(owner, name, call_or_raise)
    for number in (1, 2, 3):
        rig.fleet.post(submit(number))
    is_untouched = raising == "router" and num_replicas == 1  # nobody is asked which of one
    ends = [message for message in rig.delivered if isinstance(message, RequestEnded)]
    assert [ended.request_id for ended in ends] == ([] if is_untouched else [2])
    assert all(ended.error_code == "request_failed" and "a defect" in ended.error for ended in ends)
    assert sum(link.ledger.num_live for link in rig.links) == 3 - len(ends)
    told = [message for link in rig.links for message in rig.carrier.take_sent(link.name)]
    submitted = {message.request_id for message in told if isinstance(message, SubmitRequest)}
    assert submitted == ({1, 2, 3} if is_untouched else {1, 3})
    rig.fleet.post(CancelRequest(RequestId(2)))
