"""What a request gives back: to those who wait for all of it, and to those who stream."""

from __future__ import annotations

import asyncio

import msgspec

from ..messages.errors import (
    ContextLengthExceededError,
    EngineClosedError,
    ExecutorLostError,
    InvalidRequestError,
    ModelNumericsError,
    OctavoError,
    OutOfMemoryError,
    QueueFullError,
    RequestFailedError,
    RequestQuarantinedError,
)
from ..messages.ids import RequestId
from ..messages.request import FinishReason, PromptReady, RequestEnded, TextDelta, TokenLogprobs
from ..messages.sampling import SamplingParams


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One sequence generated for a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' log-probabilities, if logprobs were asked for."""
        return None if self.logprobs is None else sum(entry.logprob for entry in self.logprobs)


class RequestOutput(msgspec.Struct, kw_only=True):
    """A prompt and everything that was generated for it."""

    request_ids: tuple[RequestId, ...]
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    outputs: list[CompletionOutput] = msgspec.field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


class StreamDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one sequence of a stream gained."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


def error_of(ended: RequestEnded) -> OctavoError:
    """The public error that a refused or failed request stands for."""
    if ended.error_code == "queue_full":
        return QueueFullError(ended.error)
    if ended.error_code == "engine_closed":
        return EngineClosedError(ended.error)
    if ended.error_code == "executor_lost":
        return ExecutorLostError(ended.error)
    if ended.error_code == "engine_oom":
        return OutOfMemoryError(ended.error)
    if ended.error_code == "model_numerics":
        return ModelNumericsError(ended.error)
    if ended.error_code == "request_quarantined":
        return RequestQuarantinedError(ended.error)
    if ended.error_code == "context_length_exceeded":
        return ContextLengthExceededError(ended.error, param=ended.error_param or None)
    if ended.reason == "refused":
        return InvalidRequestError(ended.error, param=ended.error_param or None)
    return RequestFailedError(ended.error)


class Collector:
    """Gathers a request's deltas into a `RequestOutput`."""

    def __init__(self, prompt: str | None, params: SamplingParams, done: asyncio.Future[None]) -> None:
        self.output = RequestOutput(request_ids=(), prompt=prompt)
        self.output.outputs = [
            CompletionOutput(index=index, logprobs=None if params.logprobs is None else []) for index in range(params.n)
        ]
        self.index_of: dict[RequestId, int] = {}
        self._done = done
        self._texts: list[list[str]] = [[] for _ in range(params.n)]
        self._wants_prompt_logprobs = params.prompt_logprobs is not None

    def take(self, event: PromptReady | TextDelta) -> None:
        if isinstance(event, PromptReady):
            self.output.prompt_token_ids = event.prompt_token_ids
            return
        if self._done.done():
            return
        try:
            raise_if_failed(event)
        except OctavoError as error:
            self._done.set_exception(error)
            return
        index = self.index_of[event.request_id]
        completion = self.output.outputs[index]
        self._texts[index].append(event.text)
        completion.token_ids.extend(event.token_ids)
        if completion.logprobs is not None:
            completion.logprobs.extend(event.logprobs)
        if self._wants_prompt_logprobs and event.prompt_logprobs:
            self.output.prompt_logprobs = event.prompt_logprobs
        if event.finish_reason is not None:
            completion.text = "".join(self._texts[index])
            completion.finish_reason = event.finish_reason
            completion.stop_reason = event.stop_reason
            if event.ended is not None:
                self.output.num_cached_tokens = max(self.output.num_cached_tokens, event.ended.num_cached_tokens)
            if self.output.finished:
                self._done.set_result(None)


def raise_if_failed(event: TextDelta) -> None:
    if event.finish_reason in ("refused", "error"):
        raise error_of(event.ended or RequestEnded(event.request_id, "error", error="the request failed"))
