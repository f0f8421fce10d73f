"""An engine for the gateway's tests: its tokens are bytes, its answers given, and its steps can be taken by hand."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Sequence

import msgspec

from octavo.gateway.api.engine_protocol import Sink
from octavo.gateway.config import EngineConfig
from octavo.gateway.generation_config import RequestDefaults
from octavo.gateway.stats import EngineStats
from octavo.messages.errors import EngineClosedError, InvalidRequestError, QueueFullError
from octavo.messages.ids import RequestId
from octavo.messages.request import ChatPrompt, FinishReason, PromptReady, RequestEnded, TextDelta, TokenLogprobs
from octavo.messages.sampling import SamplingParams

BOS, EOS = 256, 257
ANSWER = "Grüße, 世界! 👋 The quick brown fox jumps over the lazy dog. "


def answer_for(prompt_ids: Sequence[int], index: int) -> bytes:
    """A text that depends on the prompt and on which of its sequences this is."""
    shift = (sum(prompt_ids) + 7 * index) % len(ANSWER)
    return (ANSWER[shift:] + ANSWER[:shift]).encode() * 40


class _Sequence:
    def __init__(self, request_id: RequestId, prompt_ids: list[int], params: SamplingParams, sink: Sink, answer: bytes):
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.params = params
        self.sink = sink
        self.answer = answer
        self.num_tokens = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.num_sent = 0
        self.stop_reason: str | None = None


class FakeEngine:
    """Same surface as `Engine`.

    Args:
        by_hand: nothing happens until `step` is called; otherwise a step is taken at each turn of the loop.
        max_live: more sequences than this are refused at once.
        answer: bytes to answer with; the sequence ends with EOS after them.
    """

    def __init__(
        self,
        *,
        by_hand: bool = False,
        max_live: int = 10_000,
        max_model_len: int = 512,
        answer: Callable[[Sequence[int], int], bytes] = answer_for,
        served_model_names: tuple[str, ...] = (),
    ) -> None:
        self.config = EngineConfig(served_model_names=served_model_names)
        self.model_name = "fake/bytes"
        self.max_model_len = max_model_len
        self.vocab_size = 260
        self.created = 1_700_000_000
        self.num_blocks = 64
        self.request_defaults = RequestDefaults()
        self.special_token_ids = frozenset({BOS, EOS})
        self.is_ready = True
        self.is_broken = False
        self.why_not_ready = ""
        self.cancelled: list[RequestId] = []
        self.was_cancelled = asyncio.Event()
        self.was_submitted = asyncio.Event()
        self.submitted: list[SamplingParams] = []
        self.prompts: list[str | Sequence[int] | ChatPrompt] = []
        self.options: list[dict[str, object]] = []
        self.fail_after: int | None = None
        self.refuse_with: tuple[str, str] | None = None
        self._by_hand = by_hand
        self._max_live = max_live
        self._answer = answer
        self._next_id = 0
        self._live: dict[RequestId, _Sequence] = {}
        self._unadmitted: list[tuple[RequestId, ...]] = []
        self._is_closed = False
        self._is_scheduled = False
        self._num_tokens = 0
        self._num_completed = 0

    @property
    def num_live(self) -> int:
        return len(self._live)

    def submit(
        self,
        prompt: str | Sequence[int] | ChatPrompt,
        params: SamplingParams,
        sink: Sink,
        *,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int = 0,
        timeout_s: float | None = None,
    ) -> tuple[RequestId, ...]:
        if self._is_closed:
            raise EngineClosedError("the engine takes no new requests")
        if len(self._live) + params.n > self._max_live:
            raise QueueFullError("too many requests", retry_after_s=3)
        self.submitted.append(params)
        self.prompts.append(prompt)
        self.options.append(
            {
                "priority": priority,
                "cache_salt": cache_salt,
                "add_special_tokens": add_special_tokens,
                "truncate_prompt_tokens": truncate_prompt_tokens,
            }
        )
        prompt_ids = self._encode(prompt, add_special_tokens)
        if truncate_prompt_tokens > 0:
            prompt_ids = prompt_ids[-truncate_prompt_tokens:]
        ids = []
        for index in range(params.n):
            request_id = RequestId(self._next_id)
            self._next_id += 1
            self._live[request_id] = _Sequence(request_id, prompt_ids, params, sink, self._answer(prompt_ids, index))
            ids.append(request_id)
        self._unadmitted.append(tuple(ids))
        self._schedule()
        self.was_submitted.set()
        return tuple(ids)

    def cancel(self, request_id: RequestId) -> None:
        if self._live.pop(request_id, None) is not None:
            self.cancelled.append(request_id)
            self.was_cancelled.set()

    def step(self, count: int = 1) -> None:
        """Admit what is new, then give one token to each live sequence, `count` times."""
        for ids in self._unadmitted:
            if ids[0] in self._live:
                self._admit(ids)
        self._unadmitted.clear()
        for _ in range(count):
            for sequence in list(self._live.values()):
                if sequence.request_id in self._live:
                    self._advance(sequence)

    def _schedule(self) -> None:
        if not self._by_hand and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        self.step()
        if self._live:
            self._schedule()

    def _admit(self, ids: tuple[RequestId, ...]) -> None:
        sequence = self._live[ids[0]]
        refusal = self.refuse_with
        if len(sequence.prompt_ids) + 1 > self.max_model_len:
            refusal = ("context_length_exceeded", f"the prompt has {len(sequence.prompt_ids)} tokens")
        if refusal is None:
            sequence.sink(PromptReady(ids, tuple(sequence.prompt_ids), sequence.params))
            return
        for request_id in ids:
            if request_id in self._live:
                self._end(self._live[request_id], "refused", error=refusal)

    def _advance(self, sequence: _Sequence) -> None:
        if self.fail_after is not None and sequence.num_tokens >= self.fail_after:
            self._end(sequence, "error", error=("request_failed", "RuntimeError: secret internals at 0x7f"))
            return
        position = sequence.num_tokens
        token_id = sequence.answer[position] if position < len(sequence.answer) else EOS
        if sequence.params.ignore_eos and token_id == EOS:
            token_id = ord(".")
        sequence.num_tokens += 1
        self._num_tokens += 1
        is_stop = token_id == EOS or token_id in sequence.params.stop_token_ids
        if not is_stop:
            sequence.text += sequence.decoder.decode(bytes((token_id,)))
        finish: FinishReason | None = "stop" if is_stop else None
        room = self.max_model_len - len(sequence.prompt_ids)
        most = min(sequence.params.max_tokens or room, room)
        for stop in sequence.params.stop:
            at = sequence.text.find(stop)
            if at >= 0:
                sequence.text = sequence.text[: at + len(stop) * sequence.params.include_stop_str_in_output]
                sequence.stop_reason = stop
                finish = "stop"
        if finish is None and sequence.num_tokens >= most:
            finish = "length"
        if finish is not None and sequence.stop_reason is None:
            sequence.text += sequence.decoder.decode(b"", final=True)
        held = 0 if finish else max((len(stop) - 1 for stop in sequence.params.stop), default=0)
        ready = max(len(sequence.text) - held, sequence.num_sent)
        text, sequence.num_sent = sequence.text[sequence.num_sent : ready], ready
        self._send(sequence, text, token_id, finish)

    def _send(self, sequence: _Sequence, text: str, token_id: int, finish: FinishReason | None) -> None:
        params = sequence.params
        ended = None
        if finish is not None:
            del self._live[sequence.request_id]
            self._num_completed += 1
            ended = RequestEnded(
                sequence.request_id, finish, num_output_tokens=sequence.num_tokens, num_cached_tokens=0
            )
        prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        if params.prompt_logprobs is not None and sequence.num_tokens == 1:
            _, *others = sequence.prompt_ids
            prompt_logprobs = (None, *(_logprobs(other, params.prompt_logprobs) for other in others))
        sequence.sink(
            TextDelta(
                sequence.request_id,
                text,
                token_ids=(token_id,),
                logprobs=() if params.logprobs is None else (_logprobs(token_id, params.logprobs),),
                finish_reason=finish,
                stop_reason=sequence.stop_reason,
                ended=ended,
                prompt_logprobs=prompt_logprobs,
            )
        )

    def _end(self, sequence: _Sequence, reason: FinishReason, *, error: tuple[str, str]) -> None:
        del self._live[sequence.request_id]
        ended = RequestEnded(sequence.request_id, reason, error_code=error[0], error=error[1])
        sequence.sink(TextDelta(sequence.request_id, "", finish_reason=reason, ended=ended))

    def _encode(self, prompt: str | Sequence[int] | ChatPrompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            messages = msgspec.json.decode(prompt.messages_json, type=list[dict[str, str]])
            text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages)
            text += "<assistant>" * prompt.add_generation_prompt
            return [BOS] * prompt.add_special_tokens + list(text.encode())
        if isinstance(prompt, str):
            return [BOS] * add_special_tokens + list(prompt.encode())
        return list(prompt)

    async def tokenize(self, prompt: str | ChatPrompt, add_special_tokens: bool = True) -> list[int]:
        return self._encode(prompt, add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        if any(not 0 <= token_id < self.vocab_size for token_id in token_ids):
            raise InvalidRequestError("token id outside the vocabulary", param="tokens")
        kept = [token for token in token_ids if not (skip_special_tokens and token in self.special_token_ids)]
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((token_id,)) if token_id < 256 else f"<{token_id}>".encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._live),
            num_waiting=0,
            num_live=len(self._live),
            kv_cache_usage=min(1.0, len(self._live) / self.num_blocks),
            num_preemptions=0,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            prompt_tokens=0,
            generation_tokens=self._num_tokens,
            num_steps=0,
            num_dropped_messages=0,
            num_completed=self._num_completed,
        )

    async def drain(self) -> None:
        self._is_closed = True
        while self._live:
            await asyncio.sleep(0)


def _logprobs(token_id: int, count: int) -> TokenLogprobs:
    top = tuple(((token_id + offset) % 256, -0.5 - offset) for offset in range(count))
    return TokenLogprobs(token_id, -0.5 if count else -0.25, 1, top)
