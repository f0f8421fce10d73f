"""Who hears what of an engine."""

from __future__ import annotations

from octavo.actors.engine.peers import Edges, Executors, edge_of, first_request_id, incarnation_of
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.request import RequestEnded
from octavo.messages.step import ExecuteStep, StepExecuted


def execute(step_id: int, epoch: int = 0) -> ExecuteStep:
    return ExecuteStep(Epoch(epoch), StepId(step_id), (), ())


def executed(step_id: int, epoch: int = 0) -> StepExecuted:
    return StepExecuted(Epoch(epoch), StepId(step_id), (), ())


class Log:
    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []

    def send(self, peer: str, message: Message) -> None:
        self.sent.append((peer, message))

    def take(self) -> list[tuple[str, Message]]:
        taken, self.sent = self.sent, []
        return taken


def test_ids_tell_their_edge_and_its_incarnation_however_often_it_was_replaced() -> None:
    for edge in ("edge 1", "edge 2", "edge 300"):
        for incarnation in (1, 255, 256, 257, 100_000):
            first = first_request_id(edge, incarnation)
            for request_id in (first, RequestId(first + 10**9)):
                assert (edge_of(request_id), incarnation_of(request_id)) == (edge, incarnation)
                assert request_id < 2**63
    assert edge_of(RequestId(10**12)) == "edge 0"


def test_an_end_is_for_the_edge_that_asked_and_a_step_for_all() -> None:
    log = Log()
    edges = Edges(["edge 0", "edge 1"], log.send)
    ended = RequestEnded(first_request_id("edge 1", 7), "stop")
    edges.post(ended)
    edges.post(RequestEnded(first_request_id("edge 2", 1), "stop"))  # has left
    edges.post(executed(1))
    assert log.take() == [("edge 1", ended), ("edge 0", executed(1)), ("edge 1", executed(1))]


def test_a_rank_that_is_started_anew_hears_the_steps_that_nobody_has_answered() -> None:
    log = Log()
    ranks = Executors(["executor 0"], log.send)
    for step_id in (0, 1, 2):
        ranks.post(execute(step_id))
    ranks.note_answer(executed(0))
    log.take()
    ranks.repeat_to("executor 0")
    assert log.take() == [("executor 0", execute(1)), ("executor 0", execute(2))]
    ranks.post(execute(3, epoch=1))
    ranks.note_answer(executed(9, epoch=0))  # late
    log.take()
    ranks.repeat_to("executor 0")
    assert log.take() == [("executor 0", execute(3, epoch=1))]
