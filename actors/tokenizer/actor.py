"""Carries prompts to the tokenizer core; long ones on a worker thread, so that no stream waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

import structlog

from ...messages.base import Message
from ...messages.errors import InvalidRequestError
from ...messages.ids import RequestId
from ...messages.request import CancelRequest, RequestEnded, SubmitPrompt
from ..runtime.in_process import InProcessRuntime
from .core import TokenizerCore

log = structlog.get_logger("octavo.tokenizer")

LONG_PROMPT_CHARS = 8192
"""About two milliseconds of tokenizing; shorter prompts are cheaper done at once than handed to a thread."""


class TokenizerActor:
    """A tokenizer whose long prompts are worked on beside the loop.

    A cancel for a prompt that is still being worked on waits for it, so that it never overtakes its request.
    """

    def __init__(self, core: TokenizerCore, runtime: InProcessRuntime) -> None:
        self._core = core
        self._runtime = runtime
        self._in_work: dict[RequestId, list[Message]] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}

    def handle(self, message: Message, now_ns: int) -> Iterable[Message]:
        """Tokenize a prompt or pass a cancel on."""
        if isinstance(message, CancelRequest):
            pending = self._in_work.get(message.request_id)
            if pending is not None:
                pending.append(message)
                return ()
            return (message,)
        assert isinstance(message, SubmitPrompt), message
        if _num_chars(message) < LONG_PROMPT_CHARS:
            return self._answer(message, now_ns)
        for request_id in message.request_ids:
            self._in_work[request_id] = []
        task = asyncio.get_running_loop().create_task(self._work(message, now_ns))
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return ()

    def _answer(self, message: SubmitPrompt, now_ns: int) -> Iterable[Message]:
        """What the core says; a prompt that its libraries stumble over is refused, and costs nobody else anything."""
        try:
            return self._core.handle(message, now_ns)
        except Exception as error:
            with suppress(Exception):  # a log that cannot be written must not lose the answer
                log.exception("tokenizer.failed", request_ids=message.request_ids)
            why = f"the prompt could not be tokenized: {type(error).__name__}: {error}"
            return [
                RequestEnded(
                    request_id, "refused", error_code=InvalidRequestError.code, error=why, error_param="prompt"
                )
                for request_id in message.request_ids
            ]

    async def close(self) -> None:
        """Wait for prompts that are being worked on."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, message: SubmitPrompt, now_ns: int) -> None:
        answers = await asyncio.to_thread(self._answer, message, now_ns)
        self._runtime.send_all("tokenizer", answers)
        for request_id in message.request_ids:
            self._runtime.send_all("tokenizer", self._in_work.pop(request_id))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._runtime.fail("tokenizer", error if isinstance(error, Exception) else RuntimeError(str(error)))


def _num_chars(message: SubmitPrompt) -> int:
    prompt = message.prompt
    if isinstance(prompt, str | tuple):
        return len(prompt)
    return len(prompt.messages_json)
