"""Who hears what of an engine."""

from __future__ import annotations

import msgspec

from octavo.actors.engine.peers import (
    Edges,
    Executors,
    by_edge,
    edge_of,
    first_request_id,
    incarnation_of,
    is_of,
)
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.request import RequestEnded, TokenLogprobs
from octavo.messages.step import ExecuteStep, PlanDue, StepExecuted


def execute(step_id: int, epoch: int = 0) -> ExecuteStep:
    return ExecuteStep(Epoch(epoch), StepId(step_id), (), ())


def executed(step_id: int, epoch: int = 0) -> StepExecuted:
    return StepExecuted(Epoch(epoch), StepId(step_id), (), ())


def rows(*of: tuple[RequestId, int]) -> StepExecuted:
    """A step in which these sampled these tokens."""
    return StepExecuted(Epoch(0), StepId(1), tuple(one for one, _ in of), tuple(token for _, token in of))


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


def test_each_edge_hears_its_own_ends_and_its_own_rows_of_a_step() -> None:
    log = Log()
    edges = Edges(["edge 0", "edge 1", "edge 3"], log.send)
    mine, theirs, gone = RequestId(5), first_request_id("edge 1", 7), first_request_id("edge 2", 1)
    ended = RequestEnded(theirs, "stop")
    edges.post(ended)
    edges.post(RequestEnded(gone, "stop"))  # has left
    edges.post(rows((mine, 10), (theirs, 11), (gone, 12), (RequestId(6), 13), (RequestId(theirs + 1), 14)))
    edges.post(PlanDue())  # is about nobody's request
    assert log.take() == [
        ("edge 1", ended),
        ("edge 0", rows((mine, 10), (RequestId(6), 13))),
        ("edge 1", rows((theirs, 11), (RequestId(theirs + 1), 14))),
        ("edge 0", PlanDue()),
        ("edge 1", PlanDue()),
        ("edge 3", PlanDue()),
    ]


def test_what_is_said_of_rows_goes_where_they_go_also_of_those_that_sampled_nothing() -> None:
    mine, theirs = RequestId(5), first_request_id("edge 1", 7)
    entry = TokenLogprobs(1, -0.5, 1)
    step = msgspec.structs.replace(
        rows((mine, 10), (theirs, 11)),
        stopped=(theirs, mine),
        logprobs=((mine, entry), (theirs, entry)),
        prompt_logprobs=((first_request_id("edge 2", 1), 1, (entry,)), (mine, 2, (entry,))),
        failed=((first_request_id("edge 3", 1), "no"), (RequestId(8), "neither")),
        nonfinite=(RequestId(8),),
        execute_ns=77,
    )
    parts = dict(by_edge(step))
    assert parts["edge 0"] == msgspec.structs.replace(
        rows((mine, 10)),
        stopped=(mine,),
        logprobs=((mine, entry),),
        prompt_logprobs=((mine, 2, (entry,)),),
        failed=((RequestId(8), "neither"),),
        nonfinite=(RequestId(8),),
        execute_ns=77,
    )
    assert parts["edge 1"] == msgspec.structs.replace(
        rows((theirs, 11)), stopped=(theirs,), logprobs=((theirs, entry),), execute_ns=77
    )
    assert parts["edge 2"] == msgspec.structs.replace(rows(), prompt_logprobs=step.prompt_logprobs[:1], execute_ns=77)
    assert parts["edge 3"] == msgspec.structs.replace(rows(), failed=step.failed[:1], execute_ns=77)
    assert len(parts) == 4


def test_a_step_of_one_edge_s_rows_is_passed_on_as_it_is_and_one_without_rows_to_nobody() -> None:
    log = Log()
    step = rows((RequestId(5), 10), (RequestId(6), 11))
    for names in (["edge 0"], ["edge 0", "edge 1"]):
        edges = Edges(names, log.send)
        edges.post(rows())
        edges.post(step)
        ((name, passed_on),) = log.take()
        assert name == "edge 0" and passed_on is step


def test_an_edge_that_was_shed_hears_nothing_and_the_others_what_they_would() -> None:
    log = Log()
    shed = ["edge 0"]
    edges = Edges(["edge 0", "edge 1"], log.send, shed)
    theirs = first_request_id("edge 1", 7)
    for message in (rows((RequestId(5), 10), (theirs, 11)), RequestEnded(RequestId(5), "stop"), PlanDue()):
        edges.post(message)
    assert log.take() == [("edge 1", rows((theirs, 11))), ("edge 1", PlanDue())]
    shed.clear()
    edges.post(RequestEnded(RequestId(6), "stop"))
    assert [name for name, _ in log.take()] == ["edge 0"]


def test_ids_of_edge_0_are_its_own_whatever_its_incarnation() -> None:
    assert is_of(RequestId(5), "edge 0", 1_700_000_000_000)
    assert is_of(first_request_id("edge 1", 7), "edge 1", 7)
    assert not is_of(first_request_id("edge 1", 7), "edge 1", 8)
    assert not is_of(first_request_id("edge 1", 7), "edge 0", 7)


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
