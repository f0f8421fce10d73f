"""What an edge says to an engine that has shed it; the engine's side is in `tests/actors/engine`."""

from __future__ import annotations

from typing import Any

from fake_carrier import FakeCarrier

from octavo.gateway.processes.engine_link import EngineLink, FromEngine
from octavo.gateway.processes.shed_edge import take_up_again
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.processes import EdgeShed, ShedHeard
from octavo.messages.request import CancelRequest, RequestEnded, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StepExecuted


def submit(request_id: int, **fields: Any) -> SubmitRequest:
    return SubmitRequest(RequestId(request_id), b"\1\0\0\0", SamplingParams(max_tokens=9, seed=1), **fields)


class Rig:
    """A link to incarnation 3 of an engine, which is up, and two requests, of which the first has a token."""

    def __init__(self) -> None:
        self.carrier = FakeCarrier()
        self.delivered: list[FromEngine] = []
        carrier: Any = self.carrier  # has what is used of it
        self.link = EngineLink("engine", carrier, "/run", deliver=self.delivered.append)
        self.link.connect(3)
        self.link.is_up = True
        for request_id in (1, 2):
            self.link.post(submit(request_id))
        self.link.take(StepExecuted(Epoch(0), StepId(0), (RequestId(1),), (5,)))
        self.carrier.sent.clear()


def test_an_edge_that_was_shed_answers_and_asks_again_from_the_tokens_that_it_has() -> None:
    rig = Rig()
    rig.link.post(CancelRequest(RequestId(2)))
    rig.link.post(submit(3))  # the engine has dropped both
    rig.carrier.sent.clear()
    take_up_again(rig.link, EdgeShed(3, 7))
    assert rig.carrier.take_sent("engine") == [
        ShedHeard(7),
        submit(1, output_token_ids=b"\5\0\0\0", is_taken_up_again=True),
        submit(2, is_taken_up_again=True),
        submit(3, is_taken_up_again=True),
        CancelRequest(RequestId(2)),
    ]
    assert rig.link.ledger.num_resubmitted == 3
    # Its epoch has not changed: steps and ends of it count.
    rig.link.take(StepExecuted(Epoch(0), StepId(9), (RequestId(1),), (6,)))
    rig.link.take(RequestEnded(RequestId(1), "stop", 2))
    assert [type(message) for message in rig.delivered] == [StepExecuted, StepExecuted, RequestEnded]
    assert rig.link.ledger.num_live == 2


def test_an_engine_that_was_replaced_meanwhile_has_heard_it_all() -> None:
    rig = Rig()
    take_up_again(rig.link, EdgeShed(2, 7))
    rig.link.is_up = False  # its successor will be given everything
    take_up_again(rig.link, EdgeShed(3, 8))
    assert rig.carrier.sent == []
