"""What a detokenizer's open streams were made of, so that a new one can go on where a crashed one stopped."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

import msgspec

from ...messages.ids import Epoch, RequestId, StepId
from ...messages.request import PromptReady, RequestEnded, TokenLogprobs
from ...messages.step import StepExecuted
from ..ledger.token_table import TokenTable

Replayed = PromptReady | StepExecuted | RequestEnded


class LoggedStream:
    """What one stream has heard.

    Attributes:
        ready: what opened it, shared by its siblings.
        tokens: its output.
        stopped_at: index in `tokens` of the token that was an end or stop token; -1 if none.
        prompt_logprobs: entries that came before the first token, with which they are sent; empty afterwards.
        ended: the scheduler's account, where it came before the last token.
    """

    __slots__ = ("ended", "prompt_logprobs", "ready", "stopped_at", "tokens")

    def __init__(self, ready: PromptReady) -> None:
        self.ready = ready
        self.tokens = array("i")
        self.stopped_at = -1
        self.prompt_logprobs: list[tuple[int, tuple[TokenLogprobs, ...]]] = []
        self.ended: RequestEnded | None = None


class StreamLog:
    """Takes note of what a detokenizer core has handled, a look-up and an append for each token.

    The log-probabilities of output tokens are not kept: they leave with their token, and what was sent is not sent
    again.
    """

    def __init__(self) -> None:
        self._streams: dict[RequestId, LoggedStream] = {}
        self._outputs = TokenTable()
        self._ended: dict[RequestId, None] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._streams

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        return tuple(self._streams)

    def num_tokens(self, request_id: RequestId) -> int:
        """Tokens that a stream has had; 0 if there is no such stream."""
        stream = self._streams.get(request_id)
        return 0 if stream is None else len(stream.tokens)

    def open(self, ready: PromptReady) -> None:
        for request_id in ready.request_ids:
            stream = self._streams[request_id] = LoggedStream(ready)
            self._outputs[request_id] = stream.tokens

    def step(self, step: StepExecuted, is_open: Callable[[RequestId], bool]) -> None:
        """Note a step; `is_open` tells of streams whose end was known before whether they still wait for tokens."""
        for request_id, first_position, entries in step.prompt_logprobs:
            stream = self._streams.get(request_id)
            if stream is not None and not stream.tokens:
                stream.prompt_logprobs.append((first_position, entries))
        self._outputs.take(step)
        for request_id in step.stopped:
            stream = self._streams.get(request_id)
            if stream is not None and stream.stopped_at < 0:
                stream.stopped_at = len(stream.tokens) - 1
        for request_id, _, _ in step.prompt_logprobs:
            stream = self._streams.get(request_id)
            if stream is not None and stream.tokens:
                stream.prompt_logprobs = []
        if self._ended:
            for request_id in list(self._ended):
                if not is_open(request_id):
                    self.forget(request_id)

    def end(self, ended: RequestEnded, is_open: Callable[[RequestId], bool]) -> None:
        """Note an end: the stream is over, unless it still waits for tokens."""
        stream = self._streams.get(ended.request_id)
        if stream is None:
            return
        if is_open(ended.request_id):
            stream.ended = ended
            self._ended[ended.request_id] = None
        else:
            self.forget(ended.request_id)

    def forget(self, request_id: RequestId) -> None:
        if self._streams.pop(request_id, None) is not None:
            del self._outputs[request_id]
            self._ended.pop(request_id, None)

    def replay(self, request_ids: Iterable[RequestId]) -> Iterable[Replayed]:
        """What brings a new core to where these streams are; its answers were sent before, or belong to no message.

        Many streams are replayed in steps of many rows, which cost a tenth of as many steps of one row.
        """
        streams = {request_id: self._streams[request_id] for request_id in request_ids}
        for request_id, stream in streams.items():
            yield msgspec.structs.replace(stream.ready, request_ids=(request_id,))
            if stream.prompt_logprobs and not stream.tokens:
                rows = tuple((request_id, first, entries) for first, entries in stream.prompt_logprobs)
                yield _step((), (), prompt_logprobs=rows)
        longest_first = sorted(streams.items(), key=lambda item: -len(item[1].tokens))
        for position in range(len(longest_first[0][1].tokens) if longest_first else 0):
            while len(longest_first[-1][1].tokens) <= position:
                longest_first.pop()
            yield _step(
                tuple([request_id for request_id, _ in longest_first]),
                tuple([stream.tokens[position] for _, stream in longest_first]),
                stopped=tuple([request_id for request_id, stream in longest_first if stream.stopped_at == position]),
            )
        for stream in streams.values():
            if stream.ended is not None:
                yield stream.ended


def _step(
    request_ids: tuple[RequestId, ...],
    token_ids: tuple[int, ...],
    *,
    stopped: tuple[RequestId, ...] = (),
    prompt_logprobs: tuple[tuple[RequestId, int, tuple[TokenLogprobs, ...]], ...] = (),
) -> StepExecuted:
    return StepExecuted(Epoch(0), StepId(0), request_ids, token_ids, stopped=stopped, prompt_logprobs=prompt_logprobs)
