"""`POST /v1/chat/completions`: a conversation in, its next message out."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from ...messages.errors import InvalidRequestError, OctavoError
from ...messages.request import ChatPrompt, TextDelta
from .chat_messages import chat_prompt
from .choice import Choice, PromptState
from .chunks import Chunks
from .context import GatewayContext
from .engine_protocol import EngineLike
from .exchange import Exchange, SubmitOptions
from .http_errors import from_public_error
from .json_body import BodyDecoder
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol import ChatRequest
from .respond import AnswerPlan, new_response_id, respond
from .sampling_fields import check_common, sampling_params
from .sse import EventSink, json_line, json_text
from .stream_journal import StreamRecord

_DECODER = BodyDecoder(ChatRequest)


async def handle_chat_completions(http_request: web.Request) -> web.StreamResponse:
    """Serve one request, whole or as a stream."""
    return await respond(http_request, _DECODER, _plan)


async def plan_chat_again(context: GatewayContext, record: StreamRecord) -> AnswerPlan:
    """How to generate once more what another server was asked for.

    Raises:
        ApiError: this server would refuse it.
    """
    return await _plan(context, _DECODER.decode(record.body), record)


async def _plan(context: GatewayContext, request: ChatRequest, record: StreamRecord | None = None) -> AnswerPlan:
    model = context.model_name(request.model)
    try:
        answer, prompt = _prepare(request, context, model, record)
    except OctavoError as error:
        raise from_public_error(error) from None
    options = SubmitOptions(
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        add_special_tokens=False,  # the conversation says so itself
        truncate_prompt_tokens=request.truncate_prompt_tokens or 0,
        timeout_s=context.settings.request_timeout_s,
        seeds=record.seeds if record is not None else (),
    )
    return AnswerPlan(
        answer.exchange,
        [PromptState(prompt, answer.echo_text)],
        options,
        answer.body,
        lambda sink: ChatChunks(answer, request, sink),
        answer.id,
        answer.created,
        "chat",
    )


def _prepare(
    request: ChatRequest, context: GatewayContext, model: str, record: StreamRecord | None
) -> tuple[ChatAnswer, ChatPrompt]:
    engine = context.engine
    check_common(request, engine)
    if request.top_logprobs is not None and request.top_logprobs != 0 and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    params = sampling_params(
        request,
        engine,
        context.settings,
        max_tokens=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        asked_as={
            "logprobs": "top_logprobs",
            "max_tokens": "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens",
        },
        defaults=None if record is None else record.defaults,
    )
    template_kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        template_kwargs.setdefault("reasoning_effort", request.reasoning_effort)
        template_kwargs.setdefault("enable_thinking", request.reasoning_effort != "none")
    prompt = chat_prompt(
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        template_kwargs=template_kwargs,
        max_messages=context.settings.max_messages,
        add_special_tokens=bool(request.add_special_tokens),
    )
    echo_text = ""
    if request.echo and request.messages[-1].role == "assistant":
        echo_text = msgspec.json.decode(prompt.messages_json)[-1]["content"]
    exchange = Exchange(engine, context.metrics, params)
    return ChatAnswer(request, exchange, engine, model, echo_text, record=record), prompt


class ChatAnswer:
    """What the whole answer and the chunks of a stream have in common.

    Args:
        echo_text: the answer begins with it.
        record: of the same answer, if it was begun before.
    """

    def __init__(
        self,
        request: ChatRequest,
        exchange: Exchange,
        engine: EngineLike,
        model: str,
        echo_text: str,
        *,
        record: StreamRecord | None = None,
    ) -> None:
        self.request = request
        self.exchange = exchange
        self.engine = engine
        self.echo_text = echo_text
        self.id = new_response_id("chatcmpl", request.request_id) if record is None else record.response_id
        self.created = int(time.time()) if record is None else record.created
        self.model = model

    def header(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        exchange, request = self.exchange, self.request
        body: dict[str, Any] = {
            **self.header("chat.completion"),
            "choices": [self._choice(choice) for choice in exchange.choices],
            "usage": exchange.usage(),
        }
        if request.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(exchange.prompts[0].prompt_logprobs, self.engine)
        if request.return_token_ids:
            body["prompt_token_ids"] = exchange.prompts[0].token_ids
        return body

    def _choice(self, choice: Choice) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": self.echo_text + "".join(choice.texts), "refusal": None},
            "logprobs": self.logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.request.return_token_ids:
            answer["token_ids"] = choice.token_ids
        return answer

    def logprobs(self, entries: Any) -> dict[str, Any] | None:
        request = self.request
        if not request.logprobs:
            return None
        return {
            "content": chat_logprobs(entries, self.engine, bool(request.return_tokens_as_token_ids)),
            "refusal": None,
        }


class ChatChunks(Chunks):
    """For each choice its role, its text, its end."""

    def __init__(self, answer: ChatAnswer, request: ChatRequest, stream: EventSink) -> None:
        super().__init__(answer.exchange, answer.header("chat.completion.chunk"), request.stream_options, stream)
        self._answer = answer
        self._request = request
        self._is_plain = not (self._with_running_usage or request.logprobs or request.return_token_ids)
        self._has_told_prompt_ids = not request.return_token_ids
        self._tail = b'},"logprobs":null,"finish_reason":null}]' + self._end

    def delta(self, choice: Choice, delta: TextDelta) -> None:
        """Tell what a choice gained."""
        if not choice.has_begun:
            self._begin(choice)
        if self._is_plain:
            if delta.text:
                self._stream.write(choice.head + json_text(delta.text) + self._tail)
        elif delta.text or delta.token_ids:
            self._rich_chunk(choice, delta)
        if delta.finish_reason is not None:
            self._stream.write(
                b"".join(
                    [
                        self._head,
                        b'%d,"delta":{},"logprobs":null,"finish_reason":' % choice.index,
                        json_line(delta.finish_reason),
                        b',"stop_reason":',
                        json_line(delta.stop_reason),
                        b"}]",
                        self._usage_or_end(),
                    ]
                )
            )

    def _begin(self, choice: Choice) -> None:
        choice.has_begun = True
        choice.head = self._head + b'%d,"delta":{"content":' % choice.index
        choice.tail = self._tail
        if self._is_plain:
            choice.stream = self._stream
        parts = [self._head, b'%d,"delta":{"role":"assistant","content":""},' % choice.index]
        parts.append(b'"logprobs":null,"finish_reason":null}]')
        if not self._has_told_prompt_ids:
            self._has_told_prompt_ids = True
            parts += [b',"prompt_token_ids":', json_line(choice.prompt.token_ids)]
        # This chunk comes before the choice's first token, which is counted already.
        num_told = sum(other.num_tokens for other in self._exchange.choices if other is not choice)
        parts.append(self._usage_or_end(num_told))
        self._stream.write(b"".join(parts))
        if self._answer.echo_text:
            self._stream.write(choice.head + json_text(self._answer.echo_text) + self._tail)

    def _rich_chunk(self, choice: Choice, delta: TextDelta) -> None:
        parts = [
            choice.head,
            json_text(delta.text),
            b'},"logprobs":',
            json_line(self._answer.logprobs(delta.logprobs)),
            b',"finish_reason":null',
        ]
        if self._request.return_token_ids:
            parts += [b',"token_ids":', json_line(delta.token_ids)]
        parts += [b"}]", self._usage_or_end()]
        self._stream.write(b"".join(parts))
