"""One request of a workload, and what a workload is."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """A request that arrives, whatever becomes of it.

    A prompt is written as runs of `(content_id, num_tokens)`. The same id stands for the same tokens, so equal leading
    runs are a shared prefix.

    Attributes:
        arrival_ns: at the gateway; from the workload's begin.
        segments: the prompt, runs of `(content_id, num_tokens)`; ids in `0 <= id < 2**31`, lengths >= 1.
        num_output_tokens: tokens it produces unless it is cut short, >= 1.
        answer_id: content id of what it generates (so that a later turn's prompt can hold it).
        priority: as in `SubmitRequest`.
        tenant: for per-tenant figures.
        cancel_after_ns: the client leaves so long after arrival; 0: never.
        timeout_ns: the request's deadline after arrival; 0: none.
        session: requests of one conversation share it; -1: none.
    """

    arrival_ns: int
    segments: tuple[tuple[int, int], ...]
    num_output_tokens: int
    answer_id: int
    priority: int = 0
    tenant: str = ""
    cancel_after_ns: int = 0
    timeout_ns: int = 0
    session: int = -1

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(num_tokens for _, num_tokens in self.segments)

    def prompt_token_ids(self) -> bytes:
        """The prompt as int32, little endian: a run of one id is that many equal tokens."""
        return b"".join([content_id.to_bytes(4, "little") * num_tokens for content_id, num_tokens in self.segments])

    def prompt_tokens(self) -> array[int]:
        """The same as an array."""
        return array("i", self.prompt_token_ids())


class WorkloadCounts(msgspec.Struct):
    """What a reader met; every row is counted in one of them.

    Attributes:
        num_rows: rows of data read.
        num_requests: rows that became requests.
        num_skipped: reason -> rows left out (zero output tokens, say).
        num_changed: reason -> requests changed (prompt cut to the context length, say).
    """

    num_rows: int = 0
    num_requests: int = 0
    num_skipped: dict[str, int] = msgspec.field(default_factory=dict)
    num_changed: dict[str, int] = msgspec.field(default_factory=dict)


class Workload(Protocol):
    """Requests in order of arrival, and those that follow upon another's end.

    All chance is drawn from seeds by request, never from the order of the calls, so the same workload is offered
    whatever configuration serves it.
    """

    @property
    def name(self) -> str:
        """For reports."""
        ...

    @property
    def counts(self) -> WorkloadCounts:
        """Complete once `arrivals` is exhausted."""
        ...

    @property
    def has_shared_prefixes(self) -> bool:
        """Whether any two prompts may begin alike; if not, prefix caching can change nothing."""
        ...

    def arrivals(self) -> Iterator[TraceRequest]:
        """Requests whose time is known beforehand, by `arrival_ns`, ties in the order of the source.

        Each call begins anew.
        """
        ...

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        """Requests that this one's end sets off (the next turn of its session, the next of a closed loop)."""
        ...
