"""Writes down what scheduler and KV allocator hear, and a checksum of what they answer; no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from ...messages.base import Message
from ...messages.errors import RequestQuarantinedError
from ...messages.ids import RequestId, StepId
from ...messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks, ResetPrefixCache
from ...messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from ...messages.sampling import SamplingParams
from ...messages.step import ExecuteStep, PlanDue, PlanStep, StepExecuted
from ...messages.system import Drain, ExecutorFailed, ExecutorLost
from .checksum import DecisionChecksum, decisions_of
from .config import (
    FORMAT_VERSION,
    MAX_FRAME_BYTES,
    MAX_FRAME_RECORDS,
    MAX_REQUEST_TOKENS,
    JournalHeader,
)
from .disguise import KEY_BYTES, TokenChain, TokenDisguise, expand_marks
from .frames import MAGIC, PREFIX_BYTES, FrameSealer
from .records import (
    ALLOCATOR_TAKES,
    DRAIN,
    FIRST_CHECK,
    MAX_UNHEARD,
    PLAN_DUE,
    RESET_PREFIX_CACHE,
    SCHEDULER_TAKES,
    AllocatorHears,
    AllocatorTakes,
    Cancelled,
    Ended,
    Executed,
    ExecutedFaulty,
    ExecutedLate,
    HeardRecord,
    Lost,
    Raised,
    Record,
    SchedulerHears,
    SchedulerTakes,
    Stopped,
    Submitted,
    SubmittedAgain,
    encode_check,
)

__all__ = [
    "ALLOCATOR_TAKES",
    "DRAIN",
    "FIRST_CHECK",
    "FORMAT_VERSION",
    "KEY_BYTES",
    "MAGIC",
    "MAX_FRAME_BYTES",
    "MAX_FRAME_RECORDS",
    "MAX_REQUEST_TOKENS",
    "MAX_UNHEARD",
    "PLAN_DUE",
    "PREFIX_BYTES",
    "RESET_PREFIX_CACHE",
    "SCHEDULER_TAKES",
    "AllocatorHears",
    "AllocatorTakes",
    "Cancelled",
    "DecisionChecksum",
    "Ended",
    "Executed",
    "ExecutedFaulty",
    "ExecutedLate",
    "FrameSealer",
    "HeardRecord",
    "JournalCore",
    "JournalHeader",
    "Lost",
    "Raised",
    "Record",
    "SchedulerHears",
    "SchedulerTakes",
    "Stopped",
    "Submitted",
    "SubmittedAgain",
    "TokenDisguise",
    "Unheard",
    "decisions_of",
    "encode_check",
    "expand_marks",
]

Handle = Callable[[Any, int], Any]

FLUSH_RECORDS = 4096
FLUSH_BYTES = 48 * 1024
FLUSH_NS = 1_000_000_000
"""A frame is handed on when it has so many records, about so many bytes, or is so old."""

_SETTLED = (StepExecuted, SubmitRequest)
"""What the scheduler hears and is written down once it has answered: the kind of record tells what became of it."""

_encode = msgspec.msgpack.Encoder().encode


class Unheard:
    """Messages that one core said and the other has not heard, oldest first; bounded.

    Recorder and replay keep the same, so that a message under way is named by its place.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()

    def __len__(self) -> int:
        return len(self._messages)

    def say(self, message: Message) -> None:
        """A message is under way."""
        self._messages.append(message)
        if len(self._messages) > MAX_UNHEARD:
            self._messages.popleft()

    def find(self, message: Message) -> int:
        """Place of a message, from the oldest; -1 if it is not under way."""
        messages = self._messages
        if messages and messages[0] is message:
            return 0
        try:
            return messages.index(message)
        except ValueError:
            return -1

    def take(self, index: int) -> Message:
        """Take one out; `IndexError` if there is none."""
        if index == 0:
            return self._messages.popleft()
        message = self._messages[index]
        del self._messages[index]
        return message


class JournalCore:
    """Turns what two cores hear and say into frames' payloads.

    Put `wrap_scheduler` and `wrap_allocator` around their `handle`; nothing else changes. A fault in here ends the
    journal, not the engine. Cores that skip steps (`advance_decode`) cannot be recorded.

    Args:
        header: how the cores begin; `key_id` is filled in.
        emit: takes each payload, in order, the header's first; must not block.
        key: of the disguise of tokens, `KEY_BYTES` long: random and secret for a live engine; not used if the header
            says `has_tokens`.
        on_fault: called once if recording fails, with the reason.
    """

    def __init__(
        self,
        header: JournalHeader,
        emit: Callable[[bytes], None],
        *,
        key: bytes = bytes(KEY_BYTES),
        on_fault: Callable[[str], None] | None = None,
    ) -> None:
        self._disguise = None if header.has_tokens else TokenDisguise(header.scheduler.block_size, key)
        # Cache salts may be secrets of clients, who did not agree to anything.
        self._salts = TokenDisguise(header.scheduler.block_size, key)
        if self._disguise is not None:
            header = msgspec.structs.replace(header, key_id=self._disguise.key_id)
        self.header = header
        self._emit = emit
        self._on_fault = on_fault
        self._is_ended = False
        self._checksum = DecisionChecksum(has_tokens=header.has_tokens)
        self._now_ns = header.start_ns
        self._epoch = header.scheduler_epoch
        self._records: list[Record] = []
        self._num_bytes = 0  # of what the records hold beside themselves, about
        self._flushed_ns = header.start_ns
        self._chains: dict[RequestId, TokenChain | None] = {}  # of requests that have not ended
        self._steps: deque[StepId] = deque()  # planned in this epoch and not executed
        self._executed_before: tuple[RequestId, ...] = ()
        self._to_allocator = Unheard()
        self._to_scheduler = Unheard()
        self._hear: dict[type, Callable[..., None]] = {
            CancelRequest: self._on_cancel,
            StopMatched: self._on_stop_matched,
            PrefixMatched: self._on_allocator_answer,
            BlocksFreed: self._on_allocator_answer,
            ExecutorLost: self._on_executor_lost,
            Drain: self._on_drain,
        }
        emit(_encode(header))

    # -- around the cores ---------------------------------------------------------------------------------------------

    def wrap_scheduler(self, handle: Handle) -> Handle:
        """Return a `handle` that writes down what it hears and says, and calls the scheduler's."""
        return self._wrap(handle, self.scheduler_hears, self.scheduler_says)

    def wrap_allocator(self, handle: Handle) -> Handle:
        """Return a `handle` that writes down what it hears and says, and calls the allocator's."""
        return self._wrap(handle, self.allocator_hears, self.allocator_says)

    def _wrap(self, handle: Handle, hears: Callable[[Any, int], None], says: Callable[[Any, Any], None]) -> Handle:
        def recorded(message: Any, now_ns: int) -> Any:
            if self._is_ended:
                return handle(message, now_ns)
            try:
                hears(message, now_ns)
            except Exception as error:
                self._fail(error)
                return handle(message, now_ns)
            try:
                answers = handle(message, now_ns)
            except Exception as error:
                if type(message) in _SETTLED:
                    says(message, ())
                self._records.append(Raised(type(error).__name__))
                raise
            try:
                says(message, answers)
                if (
                    len(self._records) >= FLUSH_RECORDS
                    or self._num_bytes >= FLUSH_BYTES
                    or now_ns - self._flushed_ns >= FLUSH_NS
                ):
                    self.flush()
            except Exception as error:
                self._fail(error)
            return answers

        return recorded

    def _fail(self, error: Exception) -> None:
        why = str(error) or type(error).__name__
        with suppress(Exception):  # whatever it is, the cores go on
            self.end(why)
        if self._on_fault is not None:
            self._on_fault(why)

    def flush(self) -> None:
        """Hand on what is written down so far."""
        self._flushed_ns = self._now_ns
        if self._records and not self._is_ended:
            records = self._records
            self._records = []
            self._num_bytes = 0
            payload = _encode(records)
            if len(payload) > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {len(payload)} bytes is too long for a journal")
            self._emit(payload)

    def flush_if_due(self, now_ns: int) -> None:
        """Hand on what is written down, if that is long ago; for times in which nothing is heard."""
        if self._records and now_ns - self._flushed_ns >= FLUSH_NS:
            try:
                self.flush()
            except Exception as error:
                self._fail(error)

    def end(self, why_incomplete: str = "") -> None:
        """Hand on the rest, and the last record; nothing is written down from now on.

        Args:
            why_incomplete: why the cores go on without a journal; empty if they do not.
        """
        if self._is_ended:
            return
        self._records.append(Ended(why_incomplete))
        try:
            self.flush()
        finally:
            self._is_ended = True
            self._records = []
            self._chains.clear()

    # -- the scheduler ------------------------------------------------------------------------------------------------

    def scheduler_hears(self, message: Message, now_ns: int) -> None:
        """Write down a message; before the scheduler handles it. Some wait for what becomes of them."""
        if now_ns != self._now_ns:
            self._tick(now_ns)
        kind = type(message)
        if kind is PlanDue:
            self._records.append(PLAN_DUE)
        elif kind not in _SETTLED:
            self._hear[kind](message)

    def _tick(self, now_ns: int) -> None:
        if now_ns < self._now_ns:
            raise ValueError(f"the clock went back by {self._now_ns - now_ns} ns")
        self._records.append(now_ns - self._now_ns)
        self._now_ns = now_ns

    def scheduler_says(self, heard: Message, answers: Sequence[Message]) -> None:
        """Write down the check of what it decided on a message, if it decided anything."""
        decisions = decisions_of(heard, answers)
        if type(heard) is StepExecuted:
            # That it was accepted is told by the kind of record.
            self._on_step_executed(heard, decisions, is_accepted=len(decisions) < len(answers))
        elif type(heard) is SubmitRequest:
            self._on_submit(heard, decisions)
        if not decisions:
            return
        self._records.append(encode_check(self._checksum.add(decisions)))
        for message in decisions:
            kind = type(message)
            if kind is RequestEnded:
                self._chains.pop(message.request_id, None)  # type: ignore[attr-defined]  # is a RequestEnded
            elif kind is not ExecutorFailed:
                if kind is PlanStep:
                    self._steps.append(message.step_id)  # type: ignore[attr-defined]  # is a PlanStep
                self._to_allocator.say(message)

    def _on_submit(self, submit: SubmitRequest, decisions: Sequence[Message]) -> None:
        params = submit.params
        tokens = submit.prompt_token_ids + submit.output_token_ids
        eos_token_ids = submit.eos_token_ids
        chain = None
        if len(tokens) > 4 * MAX_REQUEST_TOKENS:
            raise ValueError(f"a request of {len(tokens) // 4} tokens is too long for a journal")
        if self._disguise is not None:
            chain, tokens = self._disguise.begin(tokens)
            params = SamplingParams(max_tokens=params.max_tokens, prompt_logprobs=params.prompt_logprobs)
            eos_token_ids = ()
        self._chains.setdefault(submit.request_id, chain)  # one that lives already stays as it is: so does its request
        record = Submitted(
            request_id=submit.request_id,
            num_prompt_tokens=len(submit.prompt_token_ids) // 4,
            num_output_tokens=len(submit.output_token_ids) // 4,
            tokens=tokens,
            params=params,
            age_ns=self._now_ns - submit.arrival_ns,
            timeout_ns=submit.deadline_ns and submit.deadline_ns - submit.arrival_ns,
            priority=submit.priority,
            cache_salt=self._salts.salt(submit.cache_salt),
            fork_of=submit.fork_of,
            eos_token_ids=eos_token_ids,
        )
        # What hangs on tokens and parameters that a journal does not have is written down as an outcome.
        ends = [message for message in decisions if type(message) is RequestEnded]
        is_stopped = any(ended.request_id == submit.request_id and ended.reason == "stop" for ended in ends)
        is_quarantined = any(ended.error_code == RequestQuarantinedError.code for ended in ends)
        if submit.is_taken_up_again or is_stopped or is_quarantined:
            record = SubmittedAgain(
                **msgspec.structs.asdict(record),
                is_taken_up_again=submit.is_taken_up_again,
                is_stopped=is_stopped,
                is_quarantined=is_quarantined,
                num_losses=submit.num_losses,
            )
        self._records.append(record)
        self._num_bytes += len(tokens) + 64

    def _on_step_executed(self, executed: StepExecuted, decisions: Sequence[Message], *, is_accepted: bool) -> None:
        request_ids = executed.request_ids
        self._num_bytes += 8 * len(request_ids)
        if not is_accepted:
            is_oldest = executed.epoch == self._epoch and self._steps and self._steps[0] == executed.step_id
            why = "".join([message.why for message in decisions if isinstance(message, ExecutorFailed)])
            if is_oldest and why:
                is_numerics = any(isinstance(message, ExecutorFailed) and message.is_numerics for message in decisions)
                self._records.append(ExecutedFaulty(why, executed.nonfinite if is_numerics else ()))
            else:
                self._records.append(ExecutedLate(executed.epoch, executed.step_id, request_ids))
            return
        self._steps.popleft()
        token_ids = executed.token_ids
        if self._disguise is not None:
            token_ids = self._disguise_sampled(self._disguise, request_ids, token_ids)
        is_as_before = request_ids == self._executed_before
        self._executed_before = request_ids
        self._records.append(
            Executed(
                None if is_as_before else request_ids,
                token_ids,
                executed.stopped,
                executed.failed,
                executed.execute_ns,
                executed.nonfinite,
            )
        )

    def _disguise_sampled(
        self, disguise: TokenDisguise, request_ids: tuple[RequestId, ...], token_ids: tuple[int, ...]
    ) -> tuple[int, ...]:
        chains, extend = self._chains, disguise.extend
        disguised = []
        for request_id, token_id in zip(request_ids, token_ids, strict=True):
            chain = chains.get(request_id)
            # A request that has ended: a token that a step in flight still sampled, and nobody looks at.
            disguised.append(0 if chain is None else extend(chain, token_id))
        return tuple(disguised)

    def _on_cancel(self, cancel: CancelRequest) -> None:
        self._records.append(Cancelled(cancel.request_id))

    def _on_stop_matched(self, stop: StopMatched) -> None:
        self._records.append(Stopped(stop.request_id))

    def _on_executor_lost(self, lost: ExecutorLost) -> None:
        if lost.epoch > self._epoch:
            self._epoch = lost.epoch
            self._steps.clear()
        self._records.append(Lost(lost.epoch, lost.why, lost.is_innocent, lost.is_out_of_memory))

    def _on_drain(self, _: Drain) -> None:
        self._records.append(DRAIN)

    def _on_allocator_answer(self, message: PrefixMatched | BlocksFreed) -> None:
        index = self._to_scheduler.find(message)
        if index < 0:
            self._records.append(SchedulerHears(message))
            return
        self._to_scheduler.take(index)
        self._records.append(SCHEDULER_TAKES if index == 0 else SchedulerTakes(index))

    # -- the KV allocator ---------------------------------------------------------------------------------------------

    def allocator_hears(self, message: Message, now_ns: int) -> None:
        """Write down a message; before the allocator handles it."""
        if now_ns != self._now_ns:
            self._tick(now_ns)
        if type(message) is ResetPrefixCache:
            self._records.append(RESET_PREFIX_CACHE)
            return
        index = self._to_allocator.find(message)
        if index < 0:
            assert isinstance(message, PlanStep | MatchPrefix | ReleaseMatch | ResetBlocks)
            self._records.append(AllocatorHears(self._disguised(message)))
            return
        self._to_allocator.take(index)
        self._records.append(ALLOCATOR_TAKES if index == 0 else AllocatorTakes(index))

    def allocator_says(self, _: Message, answers: Sequence[Message]) -> None:
        """Write down the check of its answers, if there are any."""
        if not answers:
            return
        self._records.append(encode_check(self._checksum.add(answers)))
        for message in answers:
            if type(message) is not ExecuteStep:
                self._to_scheduler.say(message)

    def _disguised(
        self, message: PlanStep | MatchPrefix | ReleaseMatch | ResetBlocks
    ) -> PlanStep | MatchPrefix | ReleaseMatch | ResetBlocks:
        replace = msgspec.structs.replace
        if isinstance(message, MatchPrefix):
            message = replace(message, cache_salt=self._salts.salt(message.cache_salt))
        if self._disguise is None or isinstance(message, ReleaseMatch | ResetBlocks):
            return message
        disguise = self._disguise.disguise
        if isinstance(message, MatchPrefix):
            return replace(message, token_ids=disguise(message.token_ids))
        start = tuple(
            replace(start, token_ids=disguise(start.token_ids), params=SamplingParams(), eos_token_ids=())
            for start in message.start
        )
        release = tuple((request_id, disguise(token_ids)) for request_id, token_ids in message.release)
        return replace(message, start=start, release=release)
