"""`POST /v1/completions`: text in, text out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

from aiohttp import web

from ...messages.errors import ContextLengthExceededError, InvalidRequestError, OctavoError
from ...messages.request import TextDelta, TokenLogprobs
from .choice import Choice, PromptState
from .chunks import Chunks
from .context import GatewayContext
from .engine_protocol import EngineLike
from .exchange import Exchange, SubmitOptions
from .http_errors import from_public_error
from .json_body import BodyDecoder
from .logprobs import TextOffsets, completion_logprobs, prompt_logprobs
from .protocol import CompletionRequest
from .respond import AnswerPlan, new_response_id, respond
from .sampling_fields import check_common, sampling_params
from .sse import EventSink, json_line, json_text
from .stream_journal import StreamRecord

DEFAULT_MAX_TOKENS = 16

_DECODER = BodyDecoder(CompletionRequest)


async def handle_completions(http_request: web.Request) -> web.StreamResponse:
    """Serve one request, whole or as a stream."""
    return await respond(http_request, _DECODER, _plan)


async def plan_completion_again(context: GatewayContext, record: StreamRecord) -> AnswerPlan:
    """How to generate once more what another server was asked for.

    Raises:
        ApiError: this server would refuse it.
    """
    return await _plan(context, _DECODER.decode(record.body), record)


async def _plan(context: GatewayContext, request: CompletionRequest, record: StreamRecord | None = None) -> AnswerPlan:
    model = context.model_name(request.model)
    try:
        answer, prompts = await _prepare(request, context, model, record)
    except OctavoError as error:
        raise from_public_error(error) from None
    options = SubmitOptions(
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        add_special_tokens=request.add_special_tokens is not False,
        truncate_prompt_tokens=0 if request.echo else (request.truncate_prompt_tokens or 0),
        timeout_s=context.settings.request_timeout_s,
        seeds=record.seeds if record is not None else (),
    )
    return AnswerPlan(
        answer.exchange,
        prompts,
        options,
        answer.body,
        lambda sink: CompletionChunks(answer, request, sink),
        answer.id,
        answer.created,
        "completion",
    )


async def _prepare(
    request: CompletionRequest, context: GatewayContext, model: str, record: StreamRecord | None
) -> tuple[CompletionAnswer, list[PromptState]]:
    engine = context.engine
    check_common(request, engine)
    # Scoring: the engine samples one token, which the answer leaves out.
    is_scoring = bool(request.echo) and request.max_tokens == 0
    wants_prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        wants_prompt_logprobs = max(request.logprobs, -1 if wants_prompt_logprobs is None else wants_prompt_logprobs)
    params = sampling_params(
        request,
        engine,
        context.settings,
        max_tokens=1 if is_scoring else DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=wants_prompt_logprobs,
        defaults=None if record is None else record.defaults,
    )
    if request.truncate_prompt_tokens is None:
        refuse_too_many_ids(request.prompt, engine.max_model_len)
    prompts = read_prompts(request.prompt, engine.vocab_size, context.settings.max_prompts)
    states = [await _echoed(prompt, request, engine) if request.echo else PromptState(prompt) for prompt in prompts]
    exchange = Exchange(engine, context.metrics, params)
    return CompletionAnswer(request, exchange, engine, model, is_scoring, record=record), states


def refuse_too_many_ids(prompt: str | Sequence[str | int | Sequence[int]] | None, max_model_len: int) -> None:
    """Refuse token ids beyond the context before each of perhaps a million is looked at.

    Raises:
        ContextLengthExceededError: with the numbers.
    """
    if not prompt or isinstance(prompt, str):
        return
    for entry in (prompt,) if isinstance(prompt[0], int) else prompt:
        if not isinstance(entry, str | int) and len(entry) >= max_model_len:
            raise ContextLengthExceededError.of_prompt(len(entry), max_model_len)


def read_prompts(
    prompt: str | Sequence[str | int | Sequence[int]] | None, vocab_size: int, max_prompts: int
) -> list[str | tuple[int, ...]]:
    """A text, token ids, or a list of either.

    Raises:
        InvalidRequestError: empty, mixed, too many, or an id outside the vocabulary.
    """
    if prompt is None:
        raise InvalidRequestError("prompt is missing", param="prompt")
    if isinstance(prompt, str):
        prompts: list[str | tuple[int, ...]] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompts = [_token_ids(prompt, vocab_size)]
    else:
        if len(prompt) > max_prompts:
            raise InvalidRequestError(
                f"prompt has {len(prompt)} entries, but at most {max_prompts} are allowed", param="prompt"
            )
        kind = type(prompt[0]) if prompt else str
        if any(type(entry) is not kind for entry in prompt):
            raise InvalidRequestError("prompt mixes texts and token ids: send one kind", param="prompt")
        prompts = [
            entry if isinstance(entry, str) else _token_ids(entry, vocab_size)
            for entry in prompt
            if not isinstance(entry, int)
        ]
    if not prompts or not all(prompts):
        raise InvalidRequestError("prompt is empty: send at least one character or token id", param="prompt")
    return prompts


def _token_ids(entries: Sequence[object], vocab_size: int) -> tuple[int, ...]:
    if not set(map(type, entries)) <= {int}:
        raise InvalidRequestError("prompt mixes texts and token ids: send one kind", param="prompt")
    ids = cast(tuple[int, ...], tuple(entries))
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = max(ids) if max(ids) >= vocab_size else min(ids)
        raise InvalidRequestError(
            f"prompt holds token id {wrong}, but the model's are 0 to {vocab_size - 1}", param="prompt"
        )
    return ids


async def _echoed(prompt: str | tuple[int, ...], request: CompletionRequest, engine: EngineLike) -> PromptState:
    """A prompt with the text that the answer begins with."""
    keep = request.truncate_prompt_tokens
    if keep is not None:
        # What is echoed is what the model saw, so the cut is made here.
        if isinstance(prompt, str):
            prompt = tuple(await engine.tokenize(prompt, request.add_special_tokens is not False))
        prompt = prompt[-(engine.max_model_len - 1 if keep == -1 else keep) :]
    if isinstance(prompt, str):
        return PromptState(prompt, prompt)
    return PromptState(prompt, await engine.detokenize(prompt, request.skip_special_tokens is not False))


class CompletionAnswer:
    """What the whole answer and the chunks of a stream have in common.

    Args:
        is_scoring: the answer is the prompt alone.
        record: of the same answer, if it was begun before.
    """

    def __init__(
        self,
        request: CompletionRequest,
        exchange: Exchange,
        engine: EngineLike,
        model: str,
        is_scoring: bool,
        *,
        record: StreamRecord | None = None,
    ) -> None:
        self.request = request
        self.exchange = exchange
        self.engine = engine
        self.is_scoring = is_scoring
        self.id = new_response_id("cmpl", request.request_id) if record is None else record.response_id
        self.created = int(time.time()) if record is None else record.created
        self.header = {"id": self.id, "object": "text_completion", "created": self.created, "model": model}

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        exchange = self.exchange
        return {
            **self.header,
            "choices": [self._choice(choice) for choice in exchange.choices],
            "usage": exchange.usage(num_output_tokens=0 if self.is_scoring else None),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        request = self.request
        text = "" if self.is_scoring else "".join(choice.texts)
        token_ids = [] if self.is_scoring else choice.token_ids
        logprobs = self.logprobs(choice, text, token_ids, [] if self.is_scoring else choice.logprobs, is_first=True)
        answer: dict[str, Any] = {
            "index": choice.index,
            "text": choice.prompt.echo_text + text,
            "logprobs": logprobs,
            "finish_reason": "length" if self.is_scoring else choice.finish_reason,
            "stop_reason": None if self.is_scoring else choice.stop_reason,
        }
        if request.return_token_ids:
            answer["token_ids"] = token_ids
            answer["prompt_token_ids"] = choice.prompt.token_ids
        if request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(choice.prompt.prompt_logprobs, self.engine)
        return answer

    def logprobs(
        self,
        choice: Choice,
        text: str,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs],
        *,
        is_first: bool,
    ) -> dict[str, Any] | None:
        """The logprobs of these tokens, after those of the prompt if it is echoed and nothing was told yet."""
        request = self.request
        if request.logprobs is None:
            return None
        if choice.text_offsets is None:
            choice.text_offsets = TextOffsets(self.engine, request.skip_special_tokens is not False)
        all_ids: list[int] = []
        all_entries: list[TokenLogprobs | None] = []
        offsets: list[int] = []
        if request.echo and is_first:
            prompt = choice.prompt
            all_ids += prompt.token_ids
            all_entries += prompt.prompt_logprobs
            offsets += choice.text_offsets.take_prompt(prompt.token_ids, prompt.echo_text)
        all_ids += token_ids
        all_entries += entries
        offsets += choice.text_offsets.take(token_ids, text)
        return completion_logprobs(all_entries, all_ids, offsets, self.engine, bool(request.return_tokens_as_token_ids))


class CompletionChunks(Chunks):
    """For each choice its text, the first after the prompt if that is echoed."""

    def __init__(self, answer: CompletionAnswer, request: CompletionRequest, stream: EventSink) -> None:
        super().__init__(answer.exchange, answer.header, request.stream_options, stream)
        self._answer = answer
        self._request = request
        self._is_plain = not (
            self._with_running_usage or request.logprobs is not None or request.return_token_ids or answer.is_scoring
        )
        self._tail = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]' + self._end

    def delta(self, choice: Choice, delta: TextDelta) -> None:
        """Tell what a choice gained."""
        is_first = not choice.has_begun
        text, token_ids, entries = delta.text, delta.token_ids, delta.logprobs
        finish_reason: str | None = delta.finish_reason
        stop_reason = delta.stop_reason
        if self._answer.is_scoring:
            if finish_reason is None and not is_first:
                return
            text, token_ids, entries, stop_reason = "", (), (), None
            finish_reason = finish_reason and "length"
        echo = choice.prompt.echo_text if is_first else ""
        has_news = text or echo or finish_reason or (token_ids and not self._is_plain)
        if not has_news:
            return
        if is_first:
            choice.has_begun = True
            choice.head = self._head + b'%d,"text":' % choice.index
            choice.tail = self._tail
            if self._is_plain:
                choice.stream = self._stream
        logprobs = self._answer.logprobs(choice, text, token_ids, entries, is_first=is_first)
        parts = [
            choice.head,
            json_text(echo + text),
            b',"logprobs":',
            json_line(logprobs),
            b',"finish_reason":',
            json_line(finish_reason),
            b',"stop_reason":',
            json_line(stop_reason),
        ]
        if self._request.return_token_ids:
            parts += [b',"token_ids":', json_line(token_ids)]
            if is_first:
                parts += [b',"prompt_token_ids":', json_line(choice.prompt.token_ids)]
        parts += [b"}]", self._usage_or_end()]
        self._stream.write(b"".join(parts))

    def _usage(self, num_output_tokens: int | None = None) -> bytes:
        return super()._usage(0 if self._answer.is_scoring else num_output_tokens)
