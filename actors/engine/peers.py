"""The engine's carriers: to every edge, and to every rank of the executor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable
from itertools import compress

import msgspec

from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.request import RequestEnded
from ...messages.step import ExecuteStep, StepExecuted
from ..runtime.addresses import EDGE

_EDGE_BITS = 54
"""A request id's bits above these are the number of the edge that gave it."""
_INCARNATION_BITS = 36
"""Those between are that edge's incarnation; below, it counts."""
_LAST_INCARNATION = (1 << (_EDGE_BITS - _INCARNATION_BITS)) - 1

Send = Callable[[str, Message], None]


def first_request_id(edge: str, incarnation: int) -> RequestId:
    """The first id that an edge gives: no two edges, and no two incarnations of one, give the same."""
    assert incarnation <= _LAST_INCARNATION
    return RequestId(int(edge.rpartition(" ")[2]) << _EDGE_BITS | incarnation << _INCARNATION_BITS)


def edge_of(request_id: RequestId) -> str:
    """Name of the edge that gave an id."""
    return f"edge {request_id >> _EDGE_BITS}"


def incarnation_of(request_id: RequestId) -> int:
    """Which incarnation of its edge gave an id."""
    return request_id >> _INCARNATION_BITS & _LAST_INCARNATION


def is_of(request_id: RequestId, edge: str, incarnation: int) -> bool:
    """Whether this start of an edge gave an id; those of edge 0, which engines do not outlive, tell of none."""
    return edge_of(request_id) == edge and (edge == EDGE or incarnation_of(request_id) == incarnation)


def by_edge(step: StepExecuted) -> list[tuple[str, StepExecuted]]:
    """A step's results, apart by the edge that asked; none for an edge that has none.

    One edge's alone are the very same object.
    """
    owners = [request_id >> _EDGE_BITS for request_id in step.request_ids]
    numbers = dict.fromkeys(owners)
    numbers.update(dict.fromkeys(remark[0] >> _EDGE_BITS for remark in step.prompt_logprobs))
    numbers.update(dict.fromkeys(remark[0] >> _EDGE_BITS for remark in step.failed))
    if len(numbers) == 1:
        return [(f"edge {number}", step) for number in numbers]
    return [(f"edge {number}", _part_of(step, owners, number)) for number in numbers]


def _part_of(step: StepExecuted, owners: list[int], number: int) -> StepExecuted:
    is_row = [owner == number for owner in owners]
    return msgspec.structs.replace(
        step,
        request_ids=tuple(compress(step.request_ids, is_row)),
        token_ids=tuple(compress(step.token_ids, is_row)),
        stopped=tuple(request_id for request_id in step.stopped if request_id >> _EDGE_BITS == number),
        logprobs=tuple(remark for remark in step.logprobs if remark[0] >> _EDGE_BITS == number),
        prompt_logprobs=tuple(remark for remark in step.prompt_logprobs if remark[0] >> _EDGE_BITS == number),
        failed=tuple(remark for remark in step.failed if remark[0] >> _EDGE_BITS == number),
        nonfinite=tuple(request_id for request_id in step.nonfinite if request_id >> _EDGE_BITS == number),
    )


class Peers:
    """Posts to every one of some peers.

    Args:
        names: of the peers; may grow and shrink.
        send: carries a message to a peer.
    """

    def __init__(self, names: Iterable[str], send: Send) -> None:
        self.names = list(names)
        self._send = send

    def post(self, message: Message) -> None:
        for name in self.names:
            self._send(name, message)


class Edges(Peers):
    """Posts to each edge what is about its own requests, of a step its own rows; what is about none, to all.

    What an edge hears of the others' steps it learns from `EngineReport`.

    Args:
        shed: edges that hear nothing for now.
    """

    def __init__(self, names: Iterable[str], send: Send, shed: Container[str] = ()) -> None:
        super().__init__(names, send)
        self._shed = shed

    def post(self, message: Message) -> None:
        if isinstance(message, StepExecuted):
            if len(self.names) == 1 and message.request_ids:  # what is of one that has left, this one ignores
                self._post_to(self.names[0], message)
                return
            for name, rows in by_edge(message):
                self._post_to(name, rows)
        elif isinstance(message, RequestEnded):
            self._post_to(edge_of(message.request_id), message)
        else:
            for name in self.names:
                self._post_to(name, message)

    def _post_to(self, name: str, message: Message) -> None:
        if name in self.names and name not in self._shed:
            self._send(name, message)


class Executors(Peers):
    """Posts a step to every rank, and keeps it until it is answered: a rank that is replaced hears it again.

    The scheduler plans the steps of a new epoch as soon as it hears that the old one is lost, when those that will
    execute them may not have been started yet. At most as many are kept as there are steps in flight.
    """

    def __init__(self, names: Iterable[str], send: Send) -> None:
        super().__init__(names, send)
        self._unanswered: deque[ExecuteStep] = deque()

    def post(self, message: Message) -> None:
        if isinstance(message, ExecuteStep):
            unanswered = self._unanswered
            while unanswered and unanswered[0].epoch < message.epoch:
                unanswered.popleft()
            unanswered.append(message)
        super().post(message)

    def note_answer(self, executed: StepExecuted) -> None:
        """A step was executed: nobody needs to hear it again."""
        unanswered = self._unanswered
        while unanswered and (unanswered[0].epoch, unanswered[0].step_id) <= (executed.epoch, executed.step_id):
            unanswered.popleft()

    def repeat_to(self, name: str) -> None:
        """Tell a rank that was started anew what has not been answered."""
        for step in self._unanswered:
            self._send(name, step)
