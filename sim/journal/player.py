"""Plays a journal into fresh cores, message by message, and compares their decisions with the recorded ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

from ...actors.journal.core import (
    ALLOCATOR_TAKES,
    DRAIN,
    PLAN_DUE,
    RESET_PREFIX_CACHE,
    SCHEDULER_TAKES,
    AllocatorHears,
    AllocatorTakes,
    Cancelled,
    DecisionChecksum,
    Executed,
    ExecutedFaulty,
    ExecutedLate,
    JournalHeader,
    Lost,
    SchedulerHears,
    SchedulerTakes,
    Stopped,
    Submitted,
    SubmittedAgain,
    Unheard,
    decisions_of,
    encode_check,
)
from ...actors.kv_allocator.core import AllocatorInbox, KVAllocatorCore
from ...actors.scheduler.core import Quarantine, SchedulerCore, SchedulerInbox
from ...messages.base import Message
from ...messages.errors import InvalidJournalError
from ...messages.ids import Epoch, RequestId, StepId
from ...messages.kv import ResetPrefixCache
from ...messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from ...messages.step import ExecuteStep, PlanDue, PlanStep, StepExecuted
from ...messages.system import Drain, ExecutorFailed, ExecutorLost
from .reader import Entry, submitted_tokens

CoreName = Literal["scheduler", "kv_allocator"]

MAX_LIVE_TOKENS = 1 << 27
"""Tokens that requests may hold at a time, so that a forged journal cannot ask for all memory."""

_PLAN_DUE = PlanDue()


class CannotHappenError(Exception):
    """The journal tells of something that the cores, as they decide now, make impossible."""


class _RecordedQuarantine(Quarantine):
    """Finds the requests that were found: a journal does not have what they are recognised by.

    Attributes:
        is_found: the request that is submitted next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_found = False

    def holds(self, submit: SubmitRequest, now_ns: int) -> bool:
        return self.is_found


class Played(msgspec.Struct, frozen=True):
    """What one message led to.

    Attributes:
        core: who heard it.
        message: what it heard.
        answers: what it said, in order.
        raised: type and text of the exception that it raised instead.
        difference: empty if the recorded core did the same; else what it did, as far as is known.
    """

    core: CoreName
    message: Message
    answers: tuple[Message, ...]
    raised: str
    difference: str


class Player:
    """Two fresh cores, and what is under way between them.

    Args:
        header: how they begin.
    """

    def __init__(self, header: JournalHeader) -> None:
        self._header = header
        config = header.scheduler
        if not header.has_tokens:  # what stands for tokens is of any size
            config = msgspec.structs.replace(config, vocab_size=0)
        self._quarantine = _RecordedQuarantine()
        self.scheduler = SchedulerCore(config, header.scheduler_epoch, quarantine=self._quarantine)
        self.allocator = KVAllocatorCore(header.allocator, header.allocator_epoch)
        self._checksum = DecisionChecksum(has_tokens=header.has_tokens)
        self._to_allocator = Unheard()
        self._to_scheduler = Unheard()
        self.epoch = header.scheduler_epoch
        self.steps: deque[StepId] = deque()  # planned in this epoch and not executed
        self.last_step_id = -1  # planned
        self.has_executed = True  # a step, in this epoch
        self._executed_before: tuple[RequestId, ...] = ()
        self._num_tokens: dict[RequestId, int] = {}  # of open requests, as they came
        self._num_live_tokens = 0

    def play(self, entry: Entry) -> Played:
        """Let a core hear the next message.

        Raises:
            InvalidJournalError: the record contradicts itself.
            CannotHappenError: nothing like this message is under way.
        """
        core, message = self._message(entry)
        raised = ""
        answers: tuple[Message, ...] = ()
        try:
            if core == "scheduler":
                answers = tuple(self.scheduler.handle(message, entry.now_ns))  # type: ignore[arg-type]  # its inbox
            else:
                answers = tuple(self.allocator.handle(message, entry.now_ns))  # type: ignore[arg-type]  # its inbox
        except Exception as error:  # a forged journal, or a core that is at fault: the caller tells what it was
            raised = type(error).__name__
            if raised != entry.raised:
                raised = f"{raised}: {error}".rstrip(": ")
                return Played(core, message, answers, raised, self._recorded(entry))
        difference = self._recorded(entry) if raised != entry.raised else ""
        decisions = decisions_of(message, answers)
        if decisions:
            if encode_check(self._checksum.add(decisions)) != entry.check:
                difference = self._recorded(entry)
            self._carry(core, decisions)
        elif entry.check:
            difference = self._recorded(entry)
        if not raised and type(message) is StepExecuted:
            was_accepted = isinstance(entry.record, Executed)
            if was_accepted != (len(decisions) < len(answers)):
                difference = "accepted the results" if was_accepted else "did not accept the results"
        return Played(core, message, answers, raised, difference)

    @staticmethod
    def _recorded(entry: Entry) -> str:
        if entry.raised:
            return f"raised {entry.raised}"
        return "answered something else" if entry.check else "answered nothing"

    def _carry(self, core: CoreName, answers: Sequence[Message]) -> None:
        for answer in answers:
            if core == "kv_allocator":
                if type(answer) is not ExecuteStep:
                    self._to_scheduler.say(answer)
                continue
            if isinstance(answer, RequestEnded):
                self._num_live_tokens -= self._num_tokens.pop(answer.request_id, 0)
                continue
            if isinstance(answer, ExecutorFailed):
                continue
            if isinstance(answer, PlanStep):
                self.steps.append(answer.step_id)
                self.last_step_id = answer.step_id
            self._to_allocator.say(answer)

    # -- from records to messages -------------------------------------------------------------------------------------

    def _message(self, entry: Entry) -> tuple[CoreName, SchedulerInbox | AllocatorInbox]:
        record = entry.record
        if isinstance(record, int):
            return self._of_number(record)
        match record:
            case Submitted():
                return "scheduler", self._submit(record, entry)
            case Executed():
                return "scheduler", self._executed(record, entry)
            case ExecutedLate():
                token_ids = (0,) * len(record.request_ids)
                return "scheduler", StepExecuted(record.epoch, record.step_id, record.request_ids, token_ids)
            case ExecutedFaulty():
                if not self.steps:
                    raise CannotHappenError(f"results are refused ({record.why}), but no step is in flight")
                # Some that cannot be, in place of those.
                failed = tuple((request_id, record.why) for request_id in record.nonfinite or (RequestId(-1),))
                return "scheduler", StepExecuted(
                    self.epoch, self.steps[0], (), (), failed=failed, nonfinite=record.nonfinite
                )
            case Cancelled():
                return "scheduler", CancelRequest(record.request_id)
            case Stopped():
                return "scheduler", StopMatched(record.request_id)
            case Lost():
                if record.epoch > self.epoch:
                    self.epoch = Epoch(record.epoch)
                    self.steps.clear()
                    self.has_executed = False
                return "scheduler", ExecutorLost(record.epoch, record.why, record.is_innocent, record.is_out_of_memory)
            case SchedulerTakes():
                return "scheduler", self._take(self._to_scheduler, record.index, "KV allocator")
            case AllocatorTakes():
                return "kv_allocator", self._take(self._to_allocator, record.index, "scheduler")
            case SchedulerHears():
                return "scheduler", record.message
            case AllocatorHears():
                return "kv_allocator", record.message

    def _of_number(self, record: int) -> tuple[CoreName, SchedulerInbox | AllocatorInbox]:
        match record:
            case _ if record == PLAN_DUE:
                return "scheduler", _PLAN_DUE
            case _ if record == SCHEDULER_TAKES:
                return "scheduler", self._take(self._to_scheduler, 0, "KV allocator")
            case _ if record == ALLOCATOR_TAKES:
                return "kv_allocator", self._take(self._to_allocator, 0, "scheduler")
            case _ if record == DRAIN:
                return "scheduler", Drain()
            case _ if record == RESET_PREFIX_CACHE:
                return "kv_allocator", ResetPrefixCache()
            case _:
                raise InvalidJournalError(f"there is no record {record}")

    @staticmethod
    def _take(unheard: Unheard, index: int, sender: str) -> SchedulerInbox | AllocatorInbox:
        if not 0 <= index < len(unheard):
            raise CannotHappenError(
                f"message {index} of the {sender} is heard, but of {len(unheard)} under way there is none such"
            )
        return unheard.take(index)  # type: ignore[return-value]  # only such were said

    def _submit(self, record: Submitted, entry: Entry) -> SubmitRequest:
        tokens = submitted_tokens(record, self._header)
        num_prompt, num_tokens = record.num_prompt_tokens, len(tokens) // 4
        if record.request_id not in self._num_tokens:
            self._num_tokens[record.request_id] = num_tokens
            self._num_live_tokens += num_tokens
            if self._num_live_tokens > MAX_LIVE_TOKENS:
                raise InvalidJournalError(f"frame {entry.frame}: requests hold more than {MAX_LIVE_TOKENS} tokens")
        arrival_ns = entry.now_ns - record.age_ns
        is_taken_up_again, num_losses = False, 0
        params = record.params
        self._quarantine.is_found = False
        if isinstance(record, SubmittedAgain):
            is_taken_up_again, num_losses = record.is_taken_up_again, record.num_losses
            self._quarantine.is_found = record.is_quarantined
            if record.is_stopped and not self._header.has_tokens:
                last = int.from_bytes(tokens[-4:], "little", signed=True)
                params = msgspec.structs.replace(params, stop_token_ids=(last,))
        return SubmitRequest(
            request_id=record.request_id,
            prompt_token_ids=tokens[: 4 * num_prompt],
            params=params,
            eos_token_ids=record.eos_token_ids,
            arrival_ns=arrival_ns,
            priority=record.priority,
            cache_salt=record.cache_salt,
            fork_of=record.fork_of,
            deadline_ns=record.timeout_ns and arrival_ns + record.timeout_ns,
            output_token_ids=tokens[4 * num_prompt :],
            is_taken_up_again=is_taken_up_again,
            num_losses=num_losses,
        )

    def _executed(self, record: Executed, entry: Entry) -> StepExecuted:
        if record.request_ids is not None:
            self._executed_before = record.request_ids
        request_ids = self._executed_before
        if len(request_ids) != len(record.token_ids):
            raise InvalidJournalError(
                f"frame {entry.frame}: a step samples {len(record.token_ids)} tokens for {len(request_ids)} rows"
            )
        if not self.steps:
            raise CannotHappenError(f"a step that sampled requests {list(request_ids)} is done, but none is in flight")
        self.has_executed = True
        return StepExecuted(
            epoch=self.epoch,
            step_id=self.steps.popleft(),
            request_ids=request_ids,
            token_ids=record.token_ids,
            stopped=record.stopped,
            failed=record.failed,
            execute_ns=record.execute_ns,
            nonfinite=record.nonfinite,
        )
