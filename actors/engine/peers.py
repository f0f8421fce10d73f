"""The engine's carriers: to every edge, and to every rank of the executor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.request import RequestEnded
from ...messages.step import ExecuteStep, StepExecuted

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
    """Posts a step to every edge, which takes its own rows; what is about one request to that request's edge."""

    def post(self, message: Message) -> None:
        if isinstance(message, RequestEnded):
            name = edge_of(message.request_id)
            if name in self.names:
                self._send(name, message)
            return
        super().post(message)


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
