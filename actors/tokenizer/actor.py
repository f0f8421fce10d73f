"""Carries prompts to the tokenizer core; long ones on worker threads, so that no stream waits for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import structlog

from ...messages.base import Message
from ...messages.errors import InvalidRequestError, QueueFullError
from ...messages.ids import RequestId
from ...messages.request import CancelRequest, RequestEnded, SubmitPrompt
from ..runtime.routes import Address
from .core import TokenizerCore
from .job_threads import MAX_ATTEMPTS, JobThreads, Outcome
from .poison import PoisonedPrompts

log = structlog.get_logger("octavo.tokenizer")

LONG_PROMPT_CHARS = 8192
"""About two milliseconds of tokenizing; shorter prompts are cheaper done at once than handed to a thread."""


class TokenizerRuntime(Protocol):
    """What this actor needs of the runtime it lives in."""

    def send_all(self, sender: Address, messages: Iterable[Message]) -> None:
        """Deliver messages in the sender's name, in order."""

    def fail(self, address: Address, error: Exception) -> None:
        """An exception escaped this actor."""


class TokenizerActor:
    """A tokenizer that no prompt can take from the others.

    Long prompts are worked on beside the loop. A worker that dies over one, or does not come back in time, is replaced
    and the prompt tried once more; then it is refused, and so is for ten minutes whoever sends the same. A prompt that
    the libraries stumble over with an exception is refused at once. A cancel for a prompt that is still being worked
    on waits for it, so that it never overtakes its request.

    Args:
        runtime: where answers go that come later.
        workers: for long prompts.
    """

    def __init__(
        self,
        core: TokenizerCore,
        runtime: TokenizerRuntime,
        *,
        workers: JobThreads[Sequence[Message]] | None = None,
        poisoned: PoisonedPrompts | None = None,
    ) -> None:
        self._core = core
        self._runtime = runtime
        self._workers: JobThreads[Sequence[Message]] = JobThreads() if workers is None else workers
        self._poisoned = PoisonedPrompts() if poisoned is None else poisoned
        self._in_work: dict[RequestId, list[Message]] = {}

    @property
    def num_restarts(self) -> int:
        """Workers that died or were given up on."""
        return self._workers.num_restarts

    def crash(self) -> None:
        """Let the worker of the next prompt die, once, however short the prompt: for tests and `octavo chaos`."""
        self._workers.crash()

    def handle(self, message: Message, now_ns: int) -> Iterable[Message]:
        """Tokenize a prompt or pass a cancel on."""
        if isinstance(message, CancelRequest):
            pending = self._in_work.get(message.request_id)
            if pending is not None:
                pending.append(message)
                return ()
            return (message,)
        assert isinstance(message, SubmitPrompt), message
        if why := self._poisoned.find(message, now_ns):
            return _refuse(message, InvalidRequestError.code, why)
        num_tries = 0
        if _num_chars(message) < LONG_PROMPT_CHARS and not self._workers.crashes_next:
            try:
                return self._answer(message, now_ns)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a library's panic; what it leaves behind on this thread is anybody's guess
                self._log("tokenizer.worker_lost", message, error)
                self._workers.num_restarts += 1
                num_tries = 1
        for request_id in message.request_ids:
            self._in_work[request_id] = []
        self._workers.run(
            lambda: self._answer(message, now_ns),
            lambda outcome, answers: self._done(message, outcome, answers, now_ns),
            num_tries=num_tries,
        )
        return ()

    async def close(self) -> None:
        """Leave what is being worked on; nothing is waited for, as it might never come back."""
        self._workers.close()

    def _answer(self, message: SubmitPrompt, now_ns: int) -> Sequence[Message]:
        """What the core says; a prompt that its libraries stumble over is refused, and costs nobody else anything."""
        try:
            return self._core.handle(message, now_ns)
        except Exception as error:
            self._log("tokenizer.failed", message, error)
            why = f"the prompt could not be tokenized: {type(error).__name__}: {error}"
            return _refuse(message, InvalidRequestError.code, why)

    def _done(self, message: SubmitPrompt, outcome: Outcome, answers: Sequence[Message] | None, now_ns: int) -> None:
        """A worker came back, or none will."""
        if outcome == "stuck":
            why = "the tokenizer is held up by prompts that take too long: try again later"
            answers = _refuse(message, QueueFullError.code, why)
        elif outcome != "done" or answers is None:
            what = "took too long" if outcome == "hung" else "crashed the tokenizer"
            why = f"the prompt could not be tokenized: it {what}, {MAX_ATTEMPTS} times. Send another one"
            self._poisoned.add(message, why, now_ns)
            self._log("tokenizer.poisoned", message, None)
            answers = _refuse(message, InvalidRequestError.code, why)
        try:
            self._runtime.send_all("tokenizer", answers)
            for request_id in message.request_ids:
                self._runtime.send_all("tokenizer", self._in_work.pop(request_id))
        except Exception as error:  # this is a callback of the loop, which would only log it
            self._runtime.fail("tokenizer", error)

    def _log(self, event: str, message: SubmitPrompt, error: BaseException | None) -> None:
        with suppress(Exception):  # a log that cannot be written must not lose the answer
            log.error(event, request_ids=message.request_ids, exc_info=error)


def _refuse(message: SubmitPrompt, code: str, why: str) -> list[Message]:
    return [
        RequestEnded(request_id, "refused", error_code=code, error=why, error_param="prompt")
        for request_id in message.request_ids
    ]


def _num_chars(message: SubmitPrompt) -> int:
    prompt = message.prompt
    if isinstance(prompt, str | tuple):
        return len(prompt)
    return len(prompt.messages_json)
