"""One HTTP request and the sequences that the engine generates for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from ...messages.errors import OctavoError
from ...messages.ids import RequestId
from ...messages.request import ChatPrompt, FinishReason, PromptReady, RequestEnded, TextDelta
from ...messages.sampling import SamplingParams
from .choice import Choice, PromptState
from .engine_protocol import EngineEvent, EngineLike
from .http_errors import ApiError, from_ended, from_public_error
from .metrics import GatewayMetrics
from .protocol import PromptTokensDetails, Usage


class SubmitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What goes with every prompt of a request.

    Attributes:
        seeds: one for each prompt, in place of the parameters' seed; empty if there are none.
    """

    priority: int = 0
    cache_salt: str = ""
    add_special_tokens: bool = True
    truncate_prompt_tokens: int = 0
    timeout_s: float | None = None
    seeds: tuple[int, ...] = ()


class ChunkSink(Protocol):
    """Where a streamed request's deltas go; none of these waits."""

    def delta(self, choice: Choice, delta: TextDelta) -> None:
        """Tell what a choice gained; may set `choice.stream`, and then is not told again before the last delta."""

    def finished(self) -> None:
        """Every choice has ended."""

    def failed(self, error: ApiError) -> None: ...


class Exchange:
    """Submits a request's prompts, all or none, and follows them to their end.

    Args:
        engine: where they go.
        metrics: told of every token and end.
        params: the same for every prompt.
    """

    def __init__(self, engine: EngineLike, metrics: GatewayMetrics, params: SamplingParams) -> None:
        loop = asyncio.get_running_loop()
        self.params = params
        self.prompts: list[PromptState] = []
        self.choices: list[Choice] = []
        self.started: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.arrival_ns = time.monotonic_ns()
        self.first_scheduled_ns = 0  # of the first of its sequences that has ended
        self._engine = engine
        self._metrics = metrics
        self._token_gap = metrics.token_gap
        self._live: dict[RequestId, Choice] = {}
        self._prompt_of: dict[RequestId, PromptState] = {}
        self._early: list[EngineEvent] | None = []
        self._num_unadmitted = 0
        self._chunks: ChunkSink | None = None
        self._held: list[tuple[Choice, TextDelta]] = []
        self._keep = True
        self._is_open = False
        self._error: ApiError | None = None

    def submit(self, prompts: Sequence[PromptState], options: SubmitOptions) -> None:
        """Start every prompt.

        Raises:
            ApiError: one was refused at once; none is left running.
        """
        self.prompts = list(prompts)
        self._num_unadmitted = len(prompts)
        try:
            for i, prompt in enumerate(prompts):
                request_ids = self._engine.submit(
                    prompt.prompt,
                    msgspec.structs.replace(self.params, seed=options.seeds[i]) if options.seeds else self.params,
                    self.take,
                    priority=options.priority,
                    cache_salt=options.cache_salt,
                    add_special_tokens=options.add_special_tokens,
                    truncate_prompt_tokens=options.truncate_prompt_tokens,
                    timeout_s=options.timeout_s,
                )
                self._prompt_of[request_ids[0]] = prompt
                prompt.num_unfinished = len(request_ids)
                for request_id in request_ids:
                    choice = Choice(len(self.choices), prompt)
                    self.choices.append(choice)
                    self._live[request_id] = choice
        except OctavoError as error:
            self.cancel()
            raise from_public_error(error) from None
        early, self._early = self._early or [], None
        for event in early:
            self.take(event)

    def stream_to(self, chunks: ChunkSink) -> None:
        """From now on deltas go out as they come; call it before `submit`."""
        self._chunks = chunks
        self._keep = False

    def release_held(self) -> None:
        """The response's headers are on their way: what came meanwhile may follow, and what comes goes straight on."""
        assert self._chunks is not None
        held, self._held = self._held, []
        self._is_open = True
        for choice, delta in held:
            self._chunks.delta(choice, delta)
        if self._error is not None:
            self._chunks.failed(self._error)
        elif not self._live:
            self._finish()

    def take(self, event: EngineEvent) -> None:
        """What the engine says; called on the event loop."""
        if type(event) is TextDelta and event.finish_reason is None:
            # The way of nearly every token: it has a predecessor, a successor and a client.
            choice = self._live.get(event.request_id)
            if choice is not None and (stream := choice.stream) is not None and event.token_ids:
                now_ns = stream.write_text(choice.head, event.text, choice.tail)
                choice.num_tokens += len(event.token_ids)
                last_ns = choice.last_token_ns
                if now_ns > last_ns > 0:
                    self._token_gap((now_ns - last_ns) * 1e-9)
                    choice.last_token_ns = now_ns
                else:
                    self._count_time(choice, max(now_ns, last_ns))
                return
        self._take_any(event)

    def _take_any(self, event: EngineEvent) -> None:
        if self._early is not None:
            self._early.append(event)
            return
        if isinstance(event, PromptReady):
            prompt = self._prompt_of.get(event.request_ids[0])
            if prompt is not None:
                prompt.token_ids = event.prompt_token_ids
                self._admit(prompt)
            return
        choice = self._live.get(event.request_id)
        if choice is None:
            return
        if event.finish_reason is not None:
            del self._live[event.request_id]
            if event.finish_reason in ("refused", "error"):
                self._fail(event, choice)
                return
        self._count(choice, event)
        if not choice.prompt.is_admitted:
            self._admit(choice.prompt)
        if self._keep:
            choice.texts.append(event.text)
            choice.token_ids += event.token_ids
            choice.logprobs += event.logprobs
            if not self._live:
                self._finish()
            return
        if self._is_open:
            assert self._chunks is not None
            self._chunks.delta(choice, event)
            if not self._live:
                self._finish()
        else:
            self._held.append((choice, event))
            if self._num_unadmitted == 0 and not self.started.done():
                self.started.set_result(None)

    def cancel(self) -> None:
        """Nobody waits any more. Safe to call at any time, any number of times."""
        self._abort()
        for future in (self.started, self.done):
            if not future.done():
                future.cancel()

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def usage(self, *, num_output_tokens: int | None = None) -> Usage:
        """Token counts so far; `num_output_tokens` overrules what was counted."""
        num_prompt = self.num_prompt_tokens
        num_output = (
            sum(choice.num_tokens for choice in self.choices) if num_output_tokens is None else num_output_tokens
        )
        num_cached = sum(prompt.num_cached_tokens for prompt in self.prompts)
        return Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(num_cached))

    def _admit(self, prompt: PromptState) -> None:
        if prompt.is_admitted:
            return
        prompt.is_admitted = True
        self._num_unadmitted -= 1
        if self._num_unadmitted == 0 and self._held and not self.started.done():
            self.started.set_result(None)

    def _count(self, choice: Choice, event: TextDelta) -> None:
        num_new = len(event.token_ids)
        now_ns = time.monotonic_ns()
        if num_new:
            choice.num_tokens += num_new
            self._count_time(choice, now_ns)
        if event.prompt_logprobs:
            choice.prompt.prompt_logprobs = event.prompt_logprobs
        if event.finish_reason is not None:
            choice.finish_reason = event.finish_reason
            choice.stop_reason = event.stop_reason
            ended = event.ended
            if ended is not None:
                choice.num_tokens = ended.num_output_tokens
                self.first_scheduled_ns = self.first_scheduled_ns or ended.first_scheduled_ns
                choice.prompt.num_cached_tokens = max(choice.prompt.num_cached_tokens, ended.num_cached_tokens)
            choice.prompt.num_unfinished -= 1
            choice.prompt.num_longest = max(choice.prompt.num_longest, choice.num_tokens)
            self._count_end(choice, event.finish_reason, ended, now_ns)

    def _count_time(self, choice: Choice, now_ns: int) -> None:
        if choice.last_token_ns:
            # Tokens that come together came one gap apart: the gap counts once, the others are free.
            self._token_gap((now_ns - choice.last_token_ns) * 1e-9)
        else:
            choice.first_token_ns = now_ns
            self._metrics.first_token((now_ns - self.arrival_ns) * 1e-9)
        choice.last_token_ns = now_ns

    def _count_end(self, choice: Choice, reason: FinishReason, ended: RequestEnded | None, now_ns: int) -> None:
        self._metrics.sequence_ended(choice, reason, ended, arrival_ns=self.arrival_ns, now_ns=now_ns)

    def _abort(self) -> None:
        """Cancel the sequences that have not ended."""
        now_ns = time.monotonic_ns()
        for request_id, choice in self._live.items():
            self._engine.cancel(request_id)
            self._count_end(choice, "abort", None, now_ns)
        self._live.clear()

    def _finish(self) -> None:
        if self._chunks is not None:
            self._chunks.finished()
        for future in (self.started, self.done):
            if not future.done():
                future.set_result(None)

    def _fail(self, event: TextDelta, choice: Choice) -> None:
        """One sequence failed, and with it the request: the others are cancelled."""
        error = from_ended(event.ended)
        if error.param == "prompt" and isinstance(choice.prompt.prompt, ChatPrompt):
            error.param = "messages"  # as the client calls it
        ended = event.ended or RequestEnded(event.request_id, "error")
        self._metrics.request_failed(ended)
        self.end(error)

    def end(self, error: ApiError) -> None:
        """End the request with an error that its client gets to see. Nothing happens if it is over."""
        if self.done.done():
            return
        self._abort()
        if self._is_open:
            assert self._chunks is not None
            self._chunks.failed(error)
            if not self.done.done():
                self.done.set_result(None)
            return
        self._error = error  # for a response whose headers are on their way at this moment
        for future in (self.started, self.done):
            if not future.done():
                future.set_exception(error)
                future.exception()  # whichever of the two nobody waits for must not be reported as forgotten
