"""Which request an engine failed at, as far as that can be told from the message that it failed at."""

from __future__ import annotations

from typing import NamedTuple

from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.processes import EngineFailed
from ...messages.step import PlanDue, PlanStep, StepExecuted
from ...messages.system import ExecutorLost
from ..scheduler.core import SchedulerCore
from .peers import edge_of
from .trial import Trial

_NOBODY = RequestId(-1)


class Suspects(NamedTuple):
    """Of one failure.

    Attributes:
        named: the one that it was at; -1: it is not known.
        among: those that it may have been, where the message was about several.
    """

    named: RequestId = _NOBODY
    among: tuple[RequestId, ...] = ()


def find_suspects(message: Message | None, scheduler: SchedulerCore, trial: Trial) -> Suspects:
    """Return whom a failure at a message may have been about; nobody, if it was about no request.

    Of several, one on trial is held to be the cause if it was tried by itself: all others that the scheduler has have
    gained tokens there. What the scheduler knows may be half done, but not whom it has.
    """
    if scheduler.expiring_id != _NOBODY:
        return Suspects(scheduler.expiring_id)
    request_id: RequestId = getattr(message, "request_id", _NOBODY)
    if request_id != _NOBODY:
        return Suspects(request_id)
    live = scheduler.num_new_tokens()
    if isinstance(message, PlanStep):
        about = [*message.request_ids, *(request_id for request_id, _ in message.release)]
    elif isinstance(message, PlanDue | StepExecuted | ExecutorLost):
        about = scheduler.request_ids_in_hand()
    else:
        return Suspects()
    among = tuple(dict.fromkeys(request_id for request_id in about if request_id in live))
    if len(among) == 1 and len(live) == 1:
        return Suspects(among[0], among)
    # Tokens of the results that it failed at have reached nobody.
    unheard = frozenset(message.request_ids) if isinstance(message, StepExecuted) else frozenset()
    new = [request_id for request_id, num_tokens in live.items() if num_tokens - (request_id in unheard) <= 0]
    if trial.tried == new and len(new) == 1 and new[0] in among:
        return Suspects(new[0], among)
    return Suspects(_NOBODY, among)


def last_words(suspects: Suspects, incarnation: int, error: Exception) -> list[tuple[str, EngineFailed]]:
    """What each edge is to hear whose requests an engine may have failed at: of its own ones alone."""
    named, among = suspects
    why = f"{type(error).__name__}: {error}"
    edges = dict.fromkeys(edge_of(request_id) for request_id in (named, *among) if request_id != _NOBODY)
    return [
        (
            edge,
            EngineFailed(
                incarnation,
                named if named != _NOBODY and edge_of(named) == edge else _NOBODY,
                why,
                tuple(request_id for request_id in among if edge_of(request_id) == edge),
            ),
        )
        for edge in edges
    ]
