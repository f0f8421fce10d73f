"""The front end: who waits for which request. Ids are made here and every answer leaves here."""

from __future__ import annotations

import asyncio
import operator
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import msgspec
import structlog

from ..messages.base import Message
from ..messages.errors import EngineClosedError, InvalidRequestError, QueueFullError
from ..messages.ids import RequestId
from ..messages.request import CancelRequest, ChatPrompt, PromptReady, RequestEnded, StepTexts, SubmitPrompt, TextDelta
from ..messages.sampling import SamplingParams

log = structlog.get_logger("octavo.frontend")

Sink = Callable[[PromptReady | TextDelta], None]
"""Called on the event loop with what a request gained; must not block and must not raise."""


class FrontEnd:
    """Live requests and the sinks that wait for them; bounded by `max_live`.

    Args:
        send: gives a message to the runtime in the front end's name.
        max_live: sequences that may be waiting, running or being tokenized.
        seed: of the generator that seeds requests which bring no seed; each front end draws others from the same one.
        first_request_id: of the ids that this front end gives; each front end of an engine has a range of its own.
    """

    def __init__(self, send: Callable[[Message], None], *, max_live: int, seed: int, first_request_id: int = 0) -> None:
        self._send = send
        self._max_live = max_live
        self._next_id = first_request_id
        own_seed = f"{seed}/{first_request_id}" if first_request_id else seed
        self._seeds = random.Random(own_seed)  # noqa: S311  # chance of sampling, not a secret
        self._sinks: dict[RequestId, Sink] = {}
        self._deadlines: dict[RequestId, int] = {}
        self._closed_because = ""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_live(self) -> int:
        return len(self._sinks)

    @property
    def has_deadlines(self) -> bool:
        return bool(self._deadlines)

    def submit(
        self,
        prompt: str | Sequence[int] | ChatPrompt,
        params: SamplingParams,
        sink: Sink,
        *,
        now_ns: int,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int = 0,
        deadline_ns: int = 0,
    ) -> tuple[RequestId, ...]:
        """Start `params.n` sequences; the sink hears of each until a delta with a `finish_reason`.

        Raises:
            EngineClosedError: draining, closed or broken.
            QueueFullError: too many requests live already.
        """
        if self._closed_because:
            raise EngineClosedError(f"the engine takes no new requests: {self._closed_because}")
        if len(self._sinks) + params.n > self._max_live:
            raise QueueFullError(f"{len(self._sinks)} sequences are live, of at most {self._max_live}: try again later")
        if not isinstance(prompt, str | ChatPrompt):
            prompt = _token_ids(prompt)
        request_ids = tuple(RequestId(self._next_id + index) for index in range(params.n))
        self._next_id += params.n
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=self._seeds.getrandbits(63))
        self._send(
            SubmitPrompt(
                request_ids,
                prompt,
                params,
                arrival_ns=now_ns,
                priority=priority,
                cache_salt=cache_salt,
                add_special_tokens=add_special_tokens,
                truncate_prompt_tokens=truncate_prompt_tokens,
                deadline_ns=deadline_ns,
            )
        )
        # Only once it is on its way: a request that could not be sent is nobody's.
        self._idle.clear()
        for request_id in request_ids:
            self._sinks[request_id] = sink
            if deadline_ns:
                self._deadlines[request_id] = deadline_ns
        return request_ids

    def cancel(self, request_id: RequestId) -> None:
        """Nobody waits any more: no further call of its sink, its blocks are freed. Unknown ids are ignored."""
        if self._forget(request_id):
            self._send(CancelRequest(request_id))

    def handle(self, message: Message, now_ns: int) -> Iterable[Message]:
        """Pass what a request gained to whoever waits for it."""
        if isinstance(message, StepTexts):
            self._take_step(message)
        elif isinstance(message, TextDelta):
            sink = self._sinks.get(message.request_id)
            if sink is not None:
                if message.finish_reason is not None:
                    self._forget(message.request_id)
                self._call(sink, message, message.request_id)
        elif isinstance(message, PromptReady):
            for request_id in message.request_ids:  # the first that was not cancelled meanwhile
                if (sink := self._sinks.get(request_id)) is not None:
                    self._call(sink, message, request_id)
                    break
        return ()

    def _take_step(self, step: StepTexts) -> None:
        request_ids = step.request_ids
        for sink, request_id, text, token_id in zip(
            map(self._sinks.get, request_ids), request_ids, step.texts, step.token_ids, strict=True
        ):
            if sink is not None:
                try:
                    sink(TextDelta(request_id, text, (token_id,)))
                except Exception:
                    self._sink_failed(request_id)

    def close(self, why: str) -> None:
        """Take no new requests."""
        self._closed_because = self._closed_because or why

    async def wait_idle(self) -> None:
        """Return once nothing is live."""
        await self._idle.wait()

    def end_all(self, code: str, error: str) -> None:
        """End every live request with an error: the engine cannot go on."""
        for request_id, sink in list(self._sinks.items()):
            if not self._forget(request_id):
                continue  # a sink called before cancelled it
            ended = RequestEnded(request_id, "error", error_code=code, error=error)
            self._call(sink, TextDelta(request_id, "", finish_reason="error", ended=ended), request_id)

    def _forget(self, request_id: RequestId) -> bool:
        self._deadlines.pop(request_id, None)
        was_live = self._sinks.pop(request_id, None) is not None
        if not self._sinks:
            self._idle.set()
        return was_live

    def _call(self, sink: Sink, message: PromptReady | TextDelta, request_id: RequestId) -> None:
        try:
            sink(message)
        except Exception:
            self._sink_failed(request_id)

    def _sink_failed(self, request_id: RequestId) -> None:
        # A defect of one consumer must not stop the others' streams.
        self.cancel(request_id)
        with suppress(Exception):  # nor must a log that cannot be written
            log.exception("request.sink_failed", request_id=request_id)


def _token_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    """Token ids as plain integers (numpy's and torch's are taken too).

    Raises:
        InvalidRequestError: something else than a text, a conversation or integers.
    """
    try:
        if isinstance(prompt, bytes | bytearray):
            raise TypeError("bytes")
        return tuple(map(operator.index, prompt))
    except TypeError:
        raise InvalidRequestError(
            "a prompt is a text, a list of token ids or a conversation (`Engine.chat_prompt`); "
            f"got {type(prompt).__name__} of something else: send several prompts as several requests",
            param="prompt",
        ) from None
