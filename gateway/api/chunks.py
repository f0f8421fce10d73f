"""What the chunks of streamed completions and chats have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .exchange import Exchange
from .http_errors import ApiError
from .protocol import StreamOptions
from .sse import DONE, EventSink, json_line


class Chunks:
    """Writes how a stream's chunks begin and end, and what follows the last of them.

    Args:
        exchange: what is told.
        header: fields that every chunk begins with.
        options: what the client asked for.
        stream: where to.
    """

    def __init__(
        self, exchange: Exchange, header: Mapping[str, Any], options: StreamOptions | None, stream: EventSink
    ) -> None:
        self._exchange = exchange
        self._stream = stream
        self._with_usage = bool(options and options.include_usage)
        self._with_running_usage = bool(options and options.continuous_usage_stats)
        self._header = b"data: " + json_line(header)[:-1]
        self._head = self._header + b',"choices":[{"index":'
        self._end = b',"usage":null}\n\n' if self._with_usage else b"}\n\n"

    def finished(self) -> None:
        """Every choice has ended: usage if it was asked for, and the end mark."""
        if self._with_usage:
            self._stream.write(b"".join([self._header, b',"choices":[],"usage":', self._usage(), b"}\n\n"]))
        self._stream.write(DONE)

    def failed(self, error: ApiError) -> None:
        """The request failed after its first token."""
        self._stream.write(b"data: " + error.body() + b"\n\n" + DONE)

    def _usage(self, num_output_tokens: int | None = None) -> bytes:
        return msgspec.json.encode(self._exchange.usage(num_output_tokens=num_output_tokens))

    def _usage_or_end(self, num_output_tokens: int | None = None) -> bytes:
        """A chunk's end behind its choices."""
        if not self._with_running_usage:
            return self._end
        return b',"usage":' + self._usage(num_output_tokens) + b"}\n\n"
