"""Carries messages to the detokenizer core, and puts a new core in the place of one that failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import assert_never

import msgspec
import structlog

from ...messages.base import Message
from ...messages.errors import RequestFailedError
from ...messages.ids import RequestId
from ...messages.request import (
    CancelRequest,
    PromptReady,
    RequestEnded,
    StepTexts,
    StopMatched,
    TextDelta,
)
from ...messages.step import StepExecuted
from .core import DetokenizerCore, DetokenizerInbox
from .stream_log import StreamLog

DetokenizerAnswer = TextDelta | StepTexts | StopMatched | PromptReady | CancelRequest

log = structlog.get_logger("octavo.detokenizer")


class InjectedCrashError(RuntimeError):
    """Asked for by `crash()`."""


class CorePanickedError(RuntimeError):
    """The core raised what is no `Exception`."""


class DetokenizerActor:
    """A detokenizer that loses no stream when its core fails.

    After an exception a new core is brought to where every open stream was, by replaying what the streams had heard,
    and the message is handled again: nothing of it was sent, so nothing is lost or doubled. If it fails again it is
    handled in parts, a stream at a time; the stream that cannot go on ends with `RequestFailedError` and is cancelled
    at the scheduler, and the others have exactly the text that they would have had.

    Args:
        make_core: makes an empty core.

    Attributes:
        num_restarts: cores that were replaced.
        num_failed_streams: streams that could not go on.
    """

    def __init__(self, make_core: Callable[[], DetokenizerCore]) -> None:
        self._make_core = make_core
        self._core = make_core()
        self._log = StreamLog()
        self._crashes = False
        self.num_restarts = 0
        self.num_failed_streams = 0

    @property
    def num_streams(self) -> int:
        return self._core.num_streams

    @property
    def num_noted_streams(self) -> int:
        """Streams whose replay is possible: those that are open."""
        return len(self._log)

    def crash(self) -> None:
        """Let the core fail once, at the next message and after it has changed: for tests and `octavo chaos`."""
        self._crashes = True

    def handle(self, message: Message, now_ns: int) -> Sequence[DetokenizerAnswer]:
        """What the core says; never raises because of what a stream consists of."""
        assert isinstance(message, DetokenizerInbox), message
        try:
            answers = self._ask(message, now_ns)
            if self._crashes:
                self._crashes = False
                raise InjectedCrashError("a crash was asked for")
        except Exception as error:
            return self._recover(message, now_ns, error)
        self._note(message)
        return answers

    def _ask(self, message: DetokenizerInbox, now_ns: int) -> Sequence[DetokenizerAnswer]:
        try:
            return self._core.handle(message, now_ns)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a library in another language
            raise CorePanickedError(f"{type(error).__name__}: {error}") from error

    def _note(self, message: DetokenizerInbox) -> None:
        match message:
            case StepExecuted():
                self._log.step(message, self._core.has_stream)
            case PromptReady():
                self._log.open(message)
            case RequestEnded():
                self._log.end(message, self._core.has_stream)
            case CancelRequest(request_id):
                self._log.forget(request_id)
            case _:
                assert_never(message)

    def _recover(self, message: DetokenizerInbox, now_ns: int, error: Exception) -> Sequence[DetokenizerAnswer]:
        with suppress(Exception):  # a log that cannot be written must not lose the streams
            log.error("detokenizer.restarted", num_streams=len(self._log), exc_info=error)
        failed = self._restart()
        try:
            answers: Sequence[DetokenizerAnswer] = self._ask(message, now_ns)
        except Exception:
            failed += self._restart()
            return [*failed, *self._handle_in_parts(message, now_ns)]
        self._note(message)
        return [*failed, *answers] if failed else answers

    def _restart(self) -> list[DetokenizerAnswer]:
        """Put a new core where the old one was; returns the ends of streams that cannot even be replayed."""
        self.num_restarts += 1
        self._core = self._make_core()
        try:
            for message in self._log.replay(self._log.request_ids):
                self._ask(message, 0)
        except Exception:
            return self._restart_one_by_one()
        return []

    def _restart_one_by_one(self) -> list[DetokenizerAnswer]:
        self._core = self._make_core()
        ends: list[DetokenizerAnswer] = []
        for request_id in self._log.request_ids:
            try:
                for message in self._log.replay((request_id,)):
                    self._ask(message, 0)
            except Exception as error:
                ends += self._give_up(request_id, error)
        return ends

    def _handle_in_parts(self, message: DetokenizerInbox, now_ns: int) -> list[DetokenizerAnswer]:
        """Handle what failed twice, so that only the stream that is the cause is lost.

        Streams share no state but tables of the vocabulary: what was done for one cannot have spoilt another.
        """
        answers: list[DetokenizerAnswer] = []
        for request_id, part in _parts(message):
            if isinstance(part, StepExecuted) and request_id not in self._log:
                continue  # of no stream, or of one that failed in this very step
            try:
                said = self._ask(part, now_ns)
            except Exception as error:
                for guilty in part.request_ids if isinstance(part, PromptReady) else (request_id,):
                    answers += self._give_up(guilty, error, is_ended=isinstance(part, RequestEnded))
            else:
                self._note(part)
                answers += said
        return answers

    def _give_up(self, request_id: RequestId, error: Exception, *, is_ended: bool = False) -> list[DetokenizerAnswer]:
        """End a stream that cannot go on, for whoever waits for it and, unless it ended there, at the scheduler."""
        with suppress(Exception):
            log.error("detokenizer.stream_failed", request_id=request_id, exc_info=error)
        num_tokens = self._log.num_tokens(request_id)
        self._log.forget(request_id)
        with suppress(Exception):  # whatever state it is in: nothing is left of it
            self._ask(CancelRequest(request_id), 0)
        self.num_failed_streams += 1
        ended = RequestEnded(
            request_id,
            "error",
            num_tokens,
            error_code=RequestFailedError.code,
            error=f"the output could not be made into text: {type(error).__name__}: {error}",
        )
        delta = TextDelta(request_id, "", finish_reason="error", ended=ended)
        return [delta] if is_ended else [delta, CancelRequest(request_id)]


def _parts(message: DetokenizerInbox) -> list[tuple[RequestId, DetokenizerInbox]]:
    """A message as messages about one stream each; a `PromptReady` stays whole, its streams begin together."""
    if not isinstance(message, StepExecuted):
        return [(message.request_ids[0] if isinstance(message, PromptReady) else message.request_id, message)]
    step = message
    token_of = dict(zip(step.request_ids, step.token_ids, strict=True))
    logprobs = dict(step.logprobs)
    parts: list[tuple[RequestId, DetokenizerInbox]] = []
    for request_id in dict.fromkeys([*(row[0] for row in step.prompt_logprobs), *step.request_ids]):
        has_token, has_logprobs = request_id in token_of, request_id in logprobs
        part = msgspec.structs.replace(
            step,
            request_ids=(request_id,) if has_token else (),
            token_ids=(token_of[request_id],) if has_token else (),
            stopped=(request_id,) if request_id in step.stopped else (),
            logprobs=((request_id, logprobs[request_id]),) if has_logprobs else (),
            prompt_logprobs=tuple(row for row in step.prompt_logprobs if row[0] == request_id),
            failed=(),
        )
        parts.append((request_id, part))
    return parts
