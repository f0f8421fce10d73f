"""A journal of a live engine as a workload: what it was asked, to be asked of another configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...actors.journal.core import Cancelled, Executed, Stopped, Submitted
from ...messages.errors import InvalidJournalError
from ...messages.ids import RequestId
from ..journal.reader import JournalReader, submitted_tokens
from .content_ids import FIRST_PRIVATE_ID, ContentIds
from .request import TraceRequest, WorkloadCounts

Runs = tuple[tuple[int, int], ...]

_GOES_ON = "cut short or still open in the journal: goes on to its max_tokens"


class _Request:
    """One request of the journal.

    Attributes:
        node: of its last full block, and `rest`, the tokens (or their marks) behind it, int32.
        tail_runs: content of the tokens in `rest`.
        num_output: tokens sampled; `max_output` at most.
    """

    __slots__ = (
        "answer_id",
        "arrival_ns",
        "cancel_after_ns",
        "is_done",
        "max_output",
        "node",
        "num_output",
        "priority",
        "rest",
        "segments",
        "tail_runs",
        "timeout_ns",
    )

    def __init__(self, arrival_ns: int, answer_id: int) -> None:
        self.arrival_ns = arrival_ns
        self.answer_id = answer_id
        self.cancel_after_ns = 0
        self.is_done = False
        self.max_output = 1
        self.node = 0
        self.num_output = 0
        self.priority = 0
        self.rest = b""
        self.segments: Runs = ()
        self.tail_runs: Runs = ()
        self.timeout_ns = 0


class JournalWorkload:
    """The requests of a journal, in order of arrival; open loop, time 0 is the first one's arrival.

    Prompts are as alike as they were, in whole blocks of the recorded engine: a smaller block size finds no more in
    common. A prompt that holds an earlier answer holds that request's `answer_id`. Output lengths are those that were
    sampled; who was cancelled, timed out or refused gets its `max_tokens`, and its cancel or deadline as well.

    Args:
        path: of the journal; one that was cut short will do.
        name: for reports; None takes the file's.

    Raises:
        InvalidJournalError: it is no journal, was changed, or holds no request.
    """

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        self.name = name if name is not None else Path(path).name
        self.counts = WorkloadCounts()
        self.has_shared_prefixes = False
        self._nodes: dict[tuple[int, bytes], int] = {}  # (node before, content of a block) -> node
        self._runs: list[Runs] = []  # of each node
        self._num_shared = 0
        self._requests: list[_Request] = []
        self._executed_before: tuple[RequestId, ...] = ()
        with JournalReader(path) as reader:
            self._header = reader.header
            self._block_size = reader.header.scheduler.block_size
            self._max_len = reader.header.scheduler.max_sequence_len
            self._read(reader)
        if not self._requests:
            raise InvalidJournalError(f"journal {path} holds no request")
        self._requests.sort(key=lambda request: request.arrival_ns)
        self._begin_ns = self._requests[0].arrival_ns
        self.counts.num_requests = len(self._requests)
        num_going_on = sum(not request.is_done for request in self._requests)
        if num_going_on:
            self.counts.num_changed[_GOES_ON] = num_going_on
        self.content_ids = ContentIds(self._num_shared, 2 * len(self._requests))
        self._nodes.clear()
        self._runs.clear()

    def __len__(self) -> int:
        return len(self._requests)

    def arrivals(self) -> Iterator[TraceRequest]:
        """By time, ties in the order in which the scheduler heard of them."""
        for request in self._requests:
            yield TraceRequest(
                arrival_ns=request.arrival_ns - self._begin_ns,
                segments=request.segments,
                num_output_tokens=max(1, request.num_output if request.is_done else request.max_output),
                answer_id=request.answer_id,
                priority=request.priority,
                cancel_after_ns=request.cancel_after_ns,
                timeout_ns=request.timeout_ns,
            )

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        """None: what came next came at its own time."""
        return ()

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(self, reader: JournalReader) -> None:
        is_open: dict[RequestId, _Request] = {}
        for entry in reader.entries():
            match entry.record:
                case Submitted() as record:
                    self.counts.num_rows += 1
                    self._submit(record, entry.now_ns, is_open)
                case Executed() as record:
                    self._execute(record, is_open)
                case Cancelled(request_id):
                    cancelled = is_open.pop(request_id, None)
                    if cancelled is not None:
                        cancelled.cancel_after_ns = max(1, entry.now_ns - cancelled.arrival_ns)
                case Stopped(request_id):
                    stopped = is_open.pop(request_id, None)
                    if stopped is not None:
                        stopped.is_done = True

    def _skip(self, reason: str) -> None:
        self.counts.num_skipped[reason] = self.counts.num_skipped.get(reason, 0) + 1

    def _submit(self, record: Submitted, now_ns: int, is_open: dict[RequestId, _Request]) -> None:
        if record.num_prompt_tokens < 1:
            self._skip("empty prompt")
            return
        if record.request_id in is_open:
            self._skip("submitted twice")
            return
        index = len(self._requests)
        if 2 * index + 1 >= FIRST_PRIVATE_ID:
            raise InvalidJournalError(
                f"a workload has at most {FIRST_PRIVATE_ID // 2} requests: give a shorter journal"
            )
        tail_id = FIRST_PRIVATE_ID + 2 * index
        request = _Request(now_ns - record.age_ns, tail_id + 1)
        request.priority = record.priority
        request.timeout_ns = max(0, record.timeout_ns)
        room = max(1, self._max_len - record.num_prompt_tokens)
        max_tokens = record.params.max_tokens
        request.max_output = room if max_tokens is None else max(1, min(max_tokens, room))
        self._take_prompt(record, request, tail_id)
        request.num_output = record.num_output_tokens
        self._requests.append(request)
        is_open[record.request_id] = request

    def _take_prompt(self, record: Submitted, request: _Request, tail_id: int) -> None:
        tokens, num_prompt = submitted_tokens(record, self._header), record.num_prompt_tokens
        size = 4 * self._block_size
        node = self._root(record.cache_salt)
        segments: list[tuple[int, int]] = []
        num_full = num_prompt // self._block_size
        for begin in range(0, num_full * size, size):
            node = self._follow(node, tokens[begin : begin + size], None)
            _append_runs(segments, self._runs[node])
        rest = tokens[num_full * size : 4 * num_prompt]
        if rest:
            request.tail_runs = ((tail_id, len(rest) // 4),)
            segments.extend(request.tail_runs)
        request.segments = tuple(segments)
        request.node = node
        request.rest = rest
        for begin in range(4 * num_prompt, len(tokens), 4):
            self._take_output(request, tokens[begin : begin + 4])

    def _root(self, cache_salt: str) -> int:
        key = (-1, cache_salt.encode("utf-8", "surrogatepass"))
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = len(self._runs)
            self._runs.append(())
        return node

    def _follow(self, node: int, block: bytes, runs: Runs | None) -> int:
        """The node of a block behind another; a new one has these runs, or an id of its own."""
        key = (node, block if self._header.has_tokens else block[-8:])
        found = self._nodes.get(key)
        if found is None:
            if runs is None:
                runs = ((self._num_shared, self._block_size),)
                self._num_shared += 1
            found = self._nodes[key] = len(self._runs)
            self._runs.append(runs)
        else:
            self.has_shared_prefixes = True
        return found

    def _take_output(self, request: _Request, token: bytes) -> None:
        """One more token behind a request's prompt: sooner or later a block that a later prompt may hold."""
        request.rest += token
        runs: list[tuple[int, int]] = list(request.tail_runs)
        _append_runs(runs, ((request.answer_id, 1),))
        request.tail_runs = tuple(runs)
        if len(request.rest) == 4 * self._block_size:
            request.node = self._follow(request.node, request.rest, request.tail_runs)
            request.rest = b""
            request.tail_runs = ()

    def _execute(self, record: Executed, is_open: dict[RequestId, _Request]) -> None:
        if record.request_ids is not None:
            self._executed_before = record.request_ids
        request_ids = self._executed_before
        if len(request_ids) != len(record.token_ids):
            raise InvalidJournalError(f"a step samples {len(record.token_ids)} tokens for {len(request_ids)} rows")
        for request_id, token_id in zip(request_ids, record.token_ids, strict=True):
            request = is_open.get(request_id)
            if request is None:
                continue
            request.num_output += 1
            self._take_output(request, (token_id & 0xFFFFFFFF).to_bytes(4, "little"))
            if request.num_output >= request.max_output:
                request.is_done = True
                del is_open[request_id]
        for request_id in (*record.stopped, *[failed for failed, _ in record.failed]):
            request = is_open.pop(request_id, None)
            if request is not None:
                request.is_done = True


def _append_runs(runs: list[tuple[int, int]], more: Runs) -> None:
    """Append runs, joining equal neighbours."""
    for content_id, num_tokens in more:
        if runs and runs[-1][0] == content_id:
            runs[-1] = (content_id, runs[-1][1] + num_tokens)
        else:
            runs.append((content_id, num_tokens))


def read_journal(path: str | Path, *, name: str | None = None) -> JournalWorkload:
    """The requests of a journal as a workload; arguments and errors as `JournalWorkload`."""
    return JournalWorkload(path, name=name)


__all__ = ["JournalWorkload", "read_journal"]
