"""From sampled tokens to text that can be sent: owns what is not yet decoded, and looks for stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, assert_never

import msgspec

from ...messages.ids import RequestId
from ...messages.request import (
    CancelRequest,
    FinishReason,
    PromptReady,
    RequestEnded,
    StepTexts,
    StopMatched,
    TextDelta,
    TokenLogprobs,
)
from ...messages.step import StepExecuted
from .incremental import ByteDecoder, PieceTable, TokenDecoder, WindowDecoder, open_decoder
from .stop_strings import StopStream, StopStrings

DetokenizerInbox = PromptReady | StepExecuted | RequestEnded | CancelRequest
DetokenizerOutbox = TextDelta | StepTexts | StopMatched | PromptReady

_NO_LIMIT = (1 << 30) - 1  # a small int: counting down is on the path of every token


# Of a stream whose next token needs more than a look-up.
_NO_TEXTS: Final[Mapping[int, str]] = MappingProxyType({})


class _Stream:
    """One sequence's text in the making.

    Attributes:
        limit: tokens it may have, as far as is known: `max_tokens`, then what `RequestEnded` says.
        remaining: tokens until `limit`; 0 once no more tokens count.
        texts: the tokens' texts while the next token's is simply its own, else `_NO_TEXTS`.
        plain_texts: the tokens' texts, if nothing but text was asked for, else `_NO_TEXTS`.
        find_candidate: finds in a text what a stop string may begin with; None without stop strings.
        wants_logprobs: each delta carries its tokens' log-probabilities.
        discards: `max_tokens=0`: a token is sampled for the prompt's sake, and not sent.
        prompt_logprobs: what is to be sent with the first delta; empty afterwards.
        stop_string: what was matched; its `RequestEnded` is awaited.
        ended: the scheduler's account, where it came before the last token.
    """

    __slots__ = (
        "decoder",
        "discards",
        "ended",
        "find_candidate",
        "limit",
        "params",
        "plain_texts",
        "prompt_logprobs",
        "remaining",
        "request_id",
        "stop",
        "stop_string",
        "texts",
        "wants_logprobs",
    )

    def __init__(
        self,
        request_id: RequestId,
        message: PromptReady,
        decoder: ByteDecoder | WindowDecoder,
        pieces: PieceTable,
        stop: StopStream | None,
    ) -> None:
        params = message.params
        self.request_id = request_id
        self.params = params
        self.decoder = decoder
        self.stop = stop
        self.find_candidate = None if stop is None else stop.strings.search
        self.discards = params.max_tokens == 0
        self.wants_logprobs = params.logprobs is not None and not self.discards
        self.limit = params.max_tokens or _NO_LIMIT
        self.remaining = self.limit
        self.stop_string = ""
        self.ended: RequestEnded | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = (
            [] if params.prompt_logprobs is None else [None] * len(message.prompt_token_ids)
        )
        is_plain = isinstance(decoder, ByteDecoder) and not self.wants_logprobs and not self.discards
        self.plain_texts: Mapping[int, str] = pieces.texts if is_plain else _NO_TEXTS
        # The first token goes the slow way, which looks after the prompt's log-probabilities and the first space.
        self.texts: Mapping[int, str] = _NO_TEXTS

    def complete(self) -> None:
        """No more tokens count."""
        self.limit -= self.remaining
        self.remaining = 0
        self.plain_texts = self.texts = _NO_TEXTS

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        taken, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        return taken

    def feed(self, text: str) -> str:
        """Pass text on, but for what could belong to a stop string; completes the stream at a match."""
        if self.stop is None or self.stop_string:
            return "" if self.stop_string else text
        text = self.stop.feed(text, self.limit - self.remaining > self.params.min_tokens)
        if self.stop.matched:
            self.stop_string = self.stop.matched
            self.complete()
        return text

    def flush(self) -> str:
        """The rest of the text: an unfinished character, then what a stop string might have begun with."""
        if self.stop_string:
            return ""
        text = self.feed(self.decoder.flush())
        if self.stop is not None:
            text += self.stop.flush()
        return text


class DetokenizerCore:
    """Turns `StepExecuted` into one `TextDelta` for each token of an open stream, or a row of one `StepTexts`.

    `PromptReady` opens its streams and is passed on. A stream's text is the concatenation of its deltas: the text that
    decoding the output's tokens after the prompt gives, without the token that stopped it (kept under
    `include_stop_str_in_output`) and cut at a stop string. Text is sent as soon as it is sure; a last delta, empty as a
    rule, carries `finish_reason` once `RequestEnded` has come, always with the scheduler's account.
    """

    def __init__(self, codec: TokenDecoder) -> None:
        self._codec = codec
        self._streams: dict[RequestId, _Stream] = {}
        self._pieces = {skip: PieceTable(codec, skip) for skip in (False, True)}

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def has_stream(self, request_id: RequestId) -> bool:
        """Whether a stream was opened and has not had its last delta."""
        return request_id in self._streams

    def handle(self, message: DetokenizerInbox, now_ns: int) -> list[DetokenizerOutbox]:
        """Answer one message; `now_ns` is not needed here."""
        match message:
            case StepExecuted():
                return self._step(message)
            case PromptReady():
                self._open(message)
                return [message]
            case RequestEnded():
                return self._end(message)
            case CancelRequest(request_id):
                self._streams.pop(request_id, None)
                return []
            case _:
                assert_never(message)

    def _open(self, message: PromptReady) -> None:
        params = message.params
        pieces = self._pieces[params.skip_special_tokens]
        strings = StopStrings(params.stop) if params.stop else None
        for request_id in message.request_ids:
            decoder = open_decoder(
                self._codec,
                pieces,
                message.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            stop = None if strings is None else StopStream(strings, params.include_stop_str_in_output)
            self._streams[request_id] = _Stream(request_id, message, decoder, pieces, stop)

    def _step(self, step: StepExecuted) -> list[DetokenizerOutbox]:
        deltas: list[DetokenizerOutbox] = []
        find = self._streams.get
        for request_id, first_position, entries in step.prompt_logprobs:
            self._take_prompt_logprobs(request_id, first_position, entries)
        for request_id in step.stopped:
            if stream := find(request_id):
                stream.texts = _NO_TEXTS
        stopped = frozenset(step.stopped)
        logprobs = dict(step.logprobs)
        request_ids, token_ids = step.request_ids, step.token_ids
        texts: list[str | None] = []
        add = texts.append
        # 256 rows a step: the common row costs two look-ups.
        for stream, request_id, token_id in zip(map(find, request_ids), request_ids, token_ids, strict=True):
            if stream is None:
                add(None)
            elif (
                (text := stream.texts.get(token_id)) is not None
                and (remaining := stream.remaining - 1)
                and ((find_candidate := stream.find_candidate) is None or find_candidate(text) is None)
            ):
                stream.remaining = remaining
                add(text)
            else:
                add(None)
                if stream.remaining:
                    self._take_token(stream, token_id, request_id in stopped, logprobs.get(request_id), deltas)
        if together := _together(request_ids, texts, token_ids):
            deltas.append(together)
        return deltas

    def _take_token(
        self,
        stream: _Stream,
        token_id: int,
        is_stop: bool,
        logprobs: TokenLogprobs | None,
        deltas: list[DetokenizerOutbox],
    ) -> None:
        """Any token that the fast path leaves: the first, the last, part of a character, stop strings, logprobs."""
        remaining = stream.remaining = stream.remaining - 1
        text = ""
        token_ids: tuple[int, ...] = (token_id,)
        if stream.discards:
            token_ids = ()
        elif not is_stop or stream.params.include_stop_str_in_output:
            text = stream.decoder.feed(token_id)
            if stream.stop is not None:
                text = stream.feed(text)
        if is_stop or stream.stop_string or not remaining:
            self._take_last_token(stream, text, token_ids, logprobs, deltas)
            return
        is_slow = stream.decoder.is_pending or (stream.stop is not None and stream.stop.is_waiting)
        stream.texts = _NO_TEXTS if is_slow else stream.plain_texts
        if stream.wants_logprobs and logprobs is not None:
            delta = TextDelta(stream.request_id, text, token_ids, (logprobs,))
        else:
            delta = TextDelta(stream.request_id, text, token_ids)
        if stream.prompt_logprobs:
            delta = msgspec.structs.replace(delta, prompt_logprobs=stream.take_prompt_logprobs())
        deltas.append(delta)

    def _take_last_token(
        self,
        stream: _Stream,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: TokenLogprobs | None,
        deltas: list[DetokenizerOutbox],
    ) -> None:
        """Send what is left at once; the finish too, if `RequestEnded` came before."""
        stream.complete()
        text += stream.flush()
        if stream.stop_string:
            deltas.append(StopMatched(stream.request_id))
        delta = TextDelta(
            stream.request_id,
            text,
            token_ids,
            logprobs=(logprobs,) if stream.wants_logprobs and logprobs is not None else (),
            prompt_logprobs=stream.take_prompt_logprobs(),
        )
        deltas.append(delta if stream.ended is None else self._close(stream, stream.ended, delta))

    def _take_prompt_logprobs(
        self, request_id: RequestId, first_position: int, entries: Sequence[TokenLogprobs]
    ) -> None:
        # Once they are sent the list is empty: a request taken up again computes its prompt a second time.
        stream = self._streams.get(request_id)
        if stream is not None and stream.prompt_logprobs:
            stream.prompt_logprobs[first_position : first_position + len(entries)] = entries

    def _end(self, ended: RequestEnded) -> list[DetokenizerOutbox]:
        stream = self._streams.get(ended.request_id)
        if stream is None:
            # Refused before any stream was opened. Anything else was cancelled: nobody waits for it.
            if ended.reason == "refused":
                return [TextDelta(ended.request_id, "", finish_reason="refused", ended=ended)]
            return []
        num_due = ended.num_output_tokens
        if stream.discards and ended.reason in {"length", "stop"}:
            num_due = 1  # the token that is not sent comes with the prompt's log-probabilities
        missing = num_due - (stream.limit - stream.remaining)
        if stream.remaining and missing > 0 and ended.reason != "error":
            # The account overtook the last tokens. After an error they may never come.
            stream.ended = ended
            stream.limit = num_due
            stream.remaining = missing
            stream.plain_texts = stream.texts = _NO_TEXTS
            return []
        text = ""
        if stream.remaining:  # it ends without a last token: cancelled, failed, or out of time
            stream.complete()
            text = stream.flush()
        delta = TextDelta(ended.request_id, text, prompt_logprobs=stream.take_prompt_logprobs())
        return [self._close(stream, ended, delta)]

    def _close(self, stream: _Stream, ended: RequestEnded, delta: TextDelta) -> TextDelta:
        """The stream's last delta; forgets the stream."""
        del self._streams[stream.request_id]
        finish_reason: FinishReason = ended.reason
        stop_reason: str | int | None = None
        if ended.num_output_tokens < stream.limit and finish_reason in {"abort", "error"}:
            # It was ended while a step was on its way back, whose tokens the client has and the scheduler never saw.
            ended = msgspec.structs.replace(ended, num_output_tokens=stream.limit)
        if stream.stop_string:
            # The answer was whole, whatever happened to the request until the scheduler heard of it.
            finish_reason, stop_reason = "stop", stream.stop_string
            ended = msgspec.structs.replace(
                ended,
                reason="stop",
                num_output_tokens=stream.limit,
                stop_token_id=-1,
                error_code="",
                error="",
                error_param="",
            )
        elif finish_reason == "stop" and ended.stop_token_id in stream.params.stop_token_ids:
            is_eos = ended.stop_token_id in self._codec.eos_token_ids and not stream.params.ignore_eos
            stop_reason = None if is_eos else ended.stop_token_id
        if stream.discards:
            # Whatever the token was that nobody asked for, it ended nothing.
            finish_reason, stop_reason = ("length", None) if finish_reason == "stop" else (finish_reason, None)
            ended = msgspec.structs.replace(ended, reason=finish_reason, num_output_tokens=0, stop_token_id=-1)
        return msgspec.structs.replace(delta, finish_reason=finish_reason, stop_reason=stop_reason, ended=ended)


def _together(
    request_ids: tuple[RequestId, ...], texts: list[str | None], token_ids: tuple[int, ...]
) -> StepTexts | None:
    """The rows that have a text, if there are any."""
    whole = [text for text in texts if text is not None]
    if not whole:
        return None
    if len(whole) < len(texts):
        rows = [row for row, text in enumerate(texts) if text is not None]
        request_ids, token_ids = tuple([request_ids[row] for row in rows]), tuple([token_ids[row] for row in rows])
    return StepTexts(request_ids, tuple(whole), token_ids)
