"""The recipe of every live request of one edge, from which a new engine takes all of them up again."""

from __future__ import annotations

import sys
from array import array
from typing import assert_never

import msgspec

from ...messages.errors import RequestQuarantinedError
from ...messages.ids import Epoch, RequestId
from ...messages.processes import EngineFailed
from ...messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from ...messages.step import StepExecuted
from ...messages.system import EngineLost
from .token_table import TokenTable

LedgerInbox = SubmitRequest | CancelRequest | StopMatched | StepExecuted | RequestEnded | EngineLost | EngineFailed
LedgerOutbox = SubmitRequest | CancelRequest | StopMatched | StepExecuted | RequestEnded

_NOBODY = RequestId(-1)

NUM_FAILURES_ON_TRIAL = 2
"""So many engines in a row that may have failed at a request are no accident: the next one tries it apart."""

_MAX_FAILURES = 1
"""Engines that may fail at a request, one after the other without a token between them: more are no accident."""


class _Recipe:
    """One live request.

    Attributes:
        submit: as the tokenizer made it.
        tokens: int32; the output that reached this edge.
        is_cancelled, is_stopped: what was said about it to an engine, and must be said again to the next.
        num_failures: engines in a row that failed and may have done so at it, with `num_tokens_at_failure` tokens.
    """

    __slots__ = ("is_cancelled", "is_stopped", "num_failures", "num_tokens_at_failure", "submit", "tokens")

    def __init__(self, submit: SubmitRequest) -> None:
        self.submit = submit
        self.tokens = array("i")
        self.tokens.frombytes(submit.output_token_ids)
        if sys.byteorder == "big":
            self.tokens.byteswap()
        self.is_cancelled = False
        self.is_stopped = False
        self.num_failures = submit.num_failures
        self.num_tokens_at_failure = len(self.tokens) if submit.num_failures else -1

    @property
    def num_failures_now(self) -> int:
        """Engines in a row that may have failed at it, since its latest token."""
        return 0 if len(self.tokens) > self.num_tokens_at_failure else self.num_failures

    def note_failure(self) -> None:
        """An engine failed, and it may have been at this."""
        self.num_failures = self.num_failures_now + 1
        self.num_tokens_at_failure = len(self.tokens)

    def as_submit(self, fork_of: RequestId) -> SubmitRequest:
        tokens = self.tokens
        if sys.byteorder == "big":
            tokens = array("i", tokens)
            tokens.byteswap()
        return msgspec.structs.replace(
            self.submit,
            output_token_ids=tokens.tobytes(),
            fork_of=fork_of,
            is_taken_up_again=True,
            num_failures=self.num_failures_now,
        )


class LedgerCore:
    """Stands between an edge and its engine: all they say to each other about requests passes through `handle`.

    `handle` returns what goes on its way: the message itself, or nothing if it is of a dead engine or of no live
    request. To `EngineLost` it answers with what the new engine must hear: each live request again, in order of
    arrival, with the tokens that reached this edge, but first those that engines may have failed at most often;
    then the cancels and stops that were said about them. What was returned before `EngineLost` was for the old engine,
    and is dropped with it; what is returned from then on is for the new one. To `EngineFailed` it answers with the end
    of the request that it names, to be taken like an engine's, if engines fail at it again and again; the others are
    not to end with it. Of suspects it takes note: the next engine tries them apart (`actors.engine.trial`).

    A request is live from its `SubmitRequest` to its `RequestEnded`, so it ends exactly once here: an end that comes a
    second time finds no live request. Requests that the tokenizer refuses are never live and never pass here. Memory
    is bounded by the live requests, whose number the front end bounds.

    Attributes:
        num_resubmitted: recipes given to a new engine, or to one that had dropped them, in all.
        num_dropped_messages: of a dead engine, or ends of requests that had ended.
    """

    def __init__(self) -> None:
        self._recipes: dict[RequestId, _Recipe] = {}  # in order of arrival
        self._outputs = TokenTable()  # the same recipes' tokens
        self._epoch = Epoch(0)
        self.num_resubmitted = 0
        self.num_dropped_messages = 0

    @property
    def num_live(self) -> int:
        return len(self._recipes)

    def handle(self, message: LedgerInbox, now_ns: int) -> list[LedgerOutbox]:
        """Take note of one message and return what goes on; `now_ns` is not needed here."""
        match message:
            case StepExecuted():
                return self._step(message)
            case SubmitRequest(request_id):
                if request_id in self._recipes:
                    self.num_dropped_messages += 1
                    return []
                recipe = self._recipes[request_id] = _Recipe(message)
                self._outputs[request_id] = recipe.tokens
            case RequestEnded(request_id):
                if self._recipes.pop(request_id, None) is None:
                    self.num_dropped_messages += 1
                    return []
                del self._outputs[request_id]
            case CancelRequest(request_id):
                if request_id not in self._recipes:
                    return []  # it ended meanwhile
                self._recipes[request_id].is_cancelled = True
            case StopMatched(request_id):
                if request_id not in self._recipes:
                    return []
                self._recipes[request_id].is_stopped = True
            case EngineLost():
                return self._resubmit(message)
            case EngineFailed():
                return self._convict(message)
            case _:
                assert_never(message)
        return [message]

    def recipes(self) -> list[SubmitRequest]:
        """Every live request with its tokens so far, in order of arrival; `fork_of` names live siblings only."""
        return _submits(self._recipes)

    def submit_of(self, request_id: RequestId) -> SubmitRequest | None:
        """A live request as the tokenizer made it."""
        recipe = self._recipes.get(request_id)
        return recipe.submit if recipe is not None else None

    def hand_over(self, *, once: bool = False) -> list[LedgerOutbox]:
        """What other engines' ledgers must hear to go on with the live requests, which are not live here afterwards.

        Args:
            once: leave here those that were handed over like this before, and mark the others. The engine that has a
                request may be searching for the one that kills its executor: such a search ends only where one stays.
        """
        leaving = {
            request_id: recipe
            for request_id, recipe in self._recipes.items()
            if not once or not recipe.submit.num_losses
        }
        again = _everything_of(leaving)
        for request_id in leaving:
            del self._recipes[request_id], self._outputs[request_id]
        if not once:
            return again
        return [
            msgspec.structs.replace(message, num_losses=1) if isinstance(message, SubmitRequest) else message
            for message in again
        ]

    def say_again(self) -> list[LedgerOutbox]:
        """What the same engine must hear if it has dropped all that was live."""
        self.num_resubmitted += self.num_live
        return self._everything()

    def check(self) -> None:
        """Assert that both tables hold the same recipes."""
        assert list(self._recipes) == list(self._outputs)
        assert all(recipe.tokens is self._outputs[request_id] for request_id, recipe in self._recipes.items())

    def _step(self, step: StepExecuted) -> list[LedgerOutbox]:
        if step.epoch < self._epoch:
            self.num_dropped_messages += 1
            return []
        self._outputs.take(step)
        return [step]

    def _resubmit(self, lost: EngineLost) -> list[LedgerOutbox]:
        if lost.epoch <= self._epoch:
            self.num_dropped_messages += 1
            return []
        self._epoch = lost.epoch
        self.num_resubmitted += self.num_live
        return self._everything()

    def _convict(self, failed: EngineFailed) -> list[LedgerOutbox]:
        for request_id in dict.fromkeys((failed.request_id, *failed.suspects)):
            if (suspect := self._recipes.get(request_id)) is not None:
                suspect.note_failure()
        recipe = self._recipes.get(failed.request_id)
        if recipe is None:
            self.num_dropped_messages += not failed.suspects
            return []
        if recipe.num_failures <= _MAX_FAILURES:
            return []
        for other in self._recipes.values():
            if other is not recipe:
                other.num_failures = 0  # those failures are explained; the next ones may have another cause
        error = f"the engine failed {recipe.num_failures} times in a row at this request: {failed.why}"
        return [
            RequestEnded(
                failed.request_id,
                "error",
                len(recipe.tokens),
                error_code=RequestQuarantinedError.code,
                error=error,
            )
        ]

    def _everything(self) -> list[LedgerOutbox]:
        return _everything_of(self._recipes)


def _everything_of(recipes: dict[RequestId, _Recipe]) -> list[LedgerOutbox]:
    """Recipes, then the cancels and stops that were said about them."""
    again: list[LedgerOutbox] = [*_submits(recipes)]
    for request_id, recipe in recipes.items():
        if recipe.is_cancelled:
            again.append(CancelRequest(request_id))
        elif recipe.is_stopped:
            again.append(StopMatched(request_id))
    return again


def _submits(recipes: dict[RequestId, _Recipe]) -> list[SubmitRequest]:
    """Each as it is to be submitted; `fork_of` names siblings among them only."""
    submits = [
        recipe.as_submit(recipe.submit.fork_of if recipe.submit.fork_of in recipes else _NOBODY)
        for recipe in recipes.values()
    ]
    return sorted(submits, key=lambda submit: -submit.num_failures)
