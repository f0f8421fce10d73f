"""What happened, as one hash and in words."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable

from ...messages.base import Message
from ...messages.kv import BlocksFreed, PrefixMatched
from ...messages.request import RequestEnded, StepTexts, SubmitPrompt, TextDelta
from ...messages.step import ExecuteStep, PlanStep, StepExecuted
from ..agenda import Agenda

_Numbers = tuple[int, ...]


def _of_plan(plan: PlanStep) -> _Numbers:
    return plan.step_id, *plan.request_ids, *plan.num_tokens


def _of_execute(step: ExecuteStep) -> _Numbers:
    blocks = [block_id for _, block_ids in step.append_blocks for block_id in block_ids]
    return step.step_id, *step.drop, *blocks


def _of_executed(step: StepExecuted) -> _Numbers:
    return step.step_id, *step.request_ids, *step.token_ids


def _of_delta(delta: TextDelta) -> _Numbers:
    return delta.request_id, *delta.token_ids, len(delta.text)


def _of_texts(texts: StepTexts) -> _Numbers:
    return *texts.request_ids, *texts.token_ids


def _of_ended(ended: RequestEnded) -> _Numbers:
    return ended.request_id, ended.num_output_tokens, ended.stop_token_id, ended.num_preemptions


def _of_prompt(prompt: SubmitPrompt) -> _Numbers:
    return prompt.request_ids


def _of_matched(matched: PrefixMatched) -> _Numbers:
    return matched.request_id, matched.num_cached_tokens, matched.num_blocks_taken


def _of_freed(freed: BlocksFreed) -> _Numbers:
    return freed.num_blocks, freed.num_cached_blocks


_NUMBERS_OF: dict[type[Message], Callable[..., _Numbers]] = {
    PlanStep: _of_plan,
    ExecuteStep: _of_execute,
    StepExecuted: _of_executed,
    TextDelta: _of_delta,
    StepTexts: _of_texts,
    RequestEnded: _of_ended,
    SubmitPrompt: _of_prompt,
    PrefixMatched: _of_matched,
    BlocksFreed: _of_freed,
}


def _of_any(message: Message) -> _Numbers:
    request_id = getattr(message, "request_id", getattr(message, "epoch", -1))
    return (int(request_id),)


class RunHash:
    """SHA-256 over `(virtual time, actor, kind of message, its ids)` of every message handled."""

    def __init__(self) -> None:
        self._numbers = array("q")

    def noter(self, actor: int, agenda: Agenda) -> Callable[[Message], None]:
        """A function that adds a message which this actor handles now."""
        extend = self._numbers.extend
        numbers_of = _NUMBERS_OF.get

        def note(message: Message) -> None:
            kind = type(message)
            # The name's length and first letter tell kinds apart that come to one actor.
            name = kind.__name__
            extend((agenda.now_ns, actor, len(name) << 8 | ord(name[0]), *numbers_of(kind, _of_any)(message)))

        return note

    def hexdigest(self) -> str:
        if sys.byteorder == "big":
            self._numbers.byteswap()
        return hashlib.sha256(self._numbers).hexdigest()


def describe_event(time_ns: int, address: str, message: Message) -> str:
    """One line for a person."""
    return f"{time_ns / 1e6:12.6f} ms  {address:12}  {message!r}"
