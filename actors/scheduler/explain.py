"""What the scheduler is doing and why a request waits: read from its state, changing nothing.

For people: an operator who replays an incident, and tests that hold the reasons against what then happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from ...messages.ids import RequestId
from .core import SchedulerCore
from .sequence import Sequence, State
from .state import SchedulerState

Constraint = Literal["seats", "blocks", "token budget", "order", "sibling", "prefix match", "steps in flight"]
"""What a request waits for.

`order`: for its turn; who is ahead waits for what the reason says. `sibling`: for the computing of a prompt that it
shares. `prefix match`: for the KV allocator's answer. `steps in flight`: for their results.
"""


class Reason(msgspec.Struct, frozen=True):
    """Why a request computes nothing now.

    Attributes:
        constraint: what it waits for.
        detail: with numbers.
        num_ahead: requests that are to be admitted before it.
    """

    constraint: Constraint
    detail: str
    num_ahead: int = 0


class RequestState(msgspec.Struct, frozen=True):
    """One request, as the scheduler sees it.

    Attributes:
        num_tokens: prompt and known outputs.
        num_computed_tokens: whose KV is in the cache once all planned steps are executed.
        num_blocks: in its block table; `num_promised_blocks` are set aside for it beside those.
    """

    request_id: RequestId
    state: str
    priority: int
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    num_blocks: int
    num_promised_blocks: int
    num_preemptions: int


def request_states(core: SchedulerCore) -> list[RequestState]:
    """All requests that have not ended: those with a seat by their order, then the others by theirs."""
    sequences = list(core._state.sequences.values())
    unseated = {State.WAITING, State.PARKED}
    sequences.sort(key=lambda sequence: (sequence.state in unseated, sequence.key))
    block_size = core._state.block_size
    return [
        RequestState(
            request_id=sequence.request_id,
            state=sequence.state.value,
            priority=sequence.priority,
            num_prompt_tokens=sequence.num_prompt,
            num_tokens=len(sequence.tokens),
            num_computed_tokens=core._state.num_computed(sequence),
            num_blocks=sequence.num_slots // block_size,
            num_promised_blocks=sequence.num_promised,
            num_preemptions=sequence.num_preemptions,
        )
        for sequence in sequences
    ]


def is_open(core: SchedulerCore, request_id: RequestId) -> bool:
    """Whether a request was accepted and has not ended."""
    return request_id in core._state.sequences


def why_waiting(core: SchedulerCore, request_id: RequestId, rows: Iterable[RequestId] = ()) -> Reason | None:
    """Why a request is not a row of the step that was planned just now.

    Meant to be asked right after `PlanDue` was handled, when no more could be planned or admitted.

    Args:
        core: the scheduler.
        request_id: any; an unknown one, or one that has ended, waits for nothing.
        rows: `request_ids` of the last step that was planned just now.

    Returns:
        None if it does not wait.
    """
    sequence = core._state.sequences.get(request_id)
    if sequence is None or request_id in rows:
        return None
    match sequence.state:
        case State.WAITING:
            return _why_queued(core._state, sequence)
        case State.PARKED:
            return Reason("sibling", f"request {sequence.fork_of} is to compute the prompt that both share")
        case State.MATCHING:
            return Reason("prefix match", "the KV allocator is asked which of its blocks are cached")
        case State.READY:
            return _why_no_tokens(core._state, sequence)
        case State.RUNNING if not sequence.is_decoding:
            return _why_no_tokens(core._state, sequence)
        case State.RUNNING:
            return _why_not_decoding(core._state, sequence)
    return None


def _why_queued(state: SchedulerState, sequence: Sequence) -> Reason:
    waiting = [other for other in state.sequences.values() if other.state is State.WAITING]
    head = min(waiting, key=lambda other: other.key)
    reason = _why_not_admitted(state, head)
    if head is sequence:
        return reason
    num_ahead = sum(other.key < sequence.key for other in waiting)
    detail = f"{num_ahead} ahead; request {head.request_id} waits for {reason.constraint}: {reason.detail}"
    return Reason("order", detail, num_ahead)


def _why_not_admitted(state: SchedulerState, head: Sequence) -> Reason:
    """What keeps the first of the queue from being matched: the conditions of `admission.admit`, in its order."""
    if head.last_step_id > state.last_executed_step_id:
        return Reason("steps in flight", f"step {head.last_step_id}, from before its preemption, still samples for it")
    budget = state.config.max_num_batched_tokens
    if state.backlog >= budget and not (state.prompts and head.key < state.prompts[-1].key):
        return Reason("token budget", f"{state.backlog} prompt tokens are to be computed first, {budget} fit in a step")
    num_seats = state.num_seats
    if num_seats >= state.seat_limit:
        lowered = ", lowered since the executor was lost" if state.seat_limit < state.config.max_num_seqs else ""
        return Reason("seats", f"{num_seats} of {state.seat_limit} are taken{lowered}")
    num_blocks = -(-len(head.tokens) // state.block_size)
    watermark = state.watermark if num_seats else 0
    if num_blocks + watermark > state.credit:
        kept = f" and {watermark} are kept for those that run" if watermark else ""
        coming = "; more are on their way back" if state.is_owed_blocks else ""
        return Reason("blocks", f"it needs {num_blocks}{kept}, of {state.credit} to spare{coming}")
    return Reason("steps in flight", "it is admitted with the next plan")


def _why_no_tokens(state: SchedulerState, sequence: Sequence) -> Reason:
    """Why a prompt is not computed further."""
    if len(state.in_flight) >= state.config.pipeline_depth and sequence.state is State.READY:
        return Reason("steps in flight", f"{len(state.in_flight)} steps are planned, as many as may be")
    ahead = [other for other in state.prompts if other.key < sequence.key]
    detail = f"of {state.config.max_num_batched_tokens} a step, {len(state.decoding)} go to decoding requests"
    if ahead:
        detail += f" and the rest to {len(ahead)} prompts ahead"
    return Reason("token budget", detail, len(ahead))


def _why_not_decoding(state: SchedulerState, sequence: Sequence) -> Reason | None:
    num_computed = state.num_computed(sequence) + 1
    if num_computed > sequence.max_total - 1:
        return None  # the step that samples its last token is planned
    if num_computed > sequence.num_slots and state.credit <= 0:
        coming = "; some are on their way back" if state.is_owed_blocks else ""
        return Reason("blocks", f"its {sequence.num_slots // state.block_size} are full and none is to spare{coming}")
    if len(state.decoding) > state.config.max_num_batched_tokens:
        return Reason("token budget", f"{len(state.decoding)} decode, {state.config.max_num_batched_tokens} a step")
    return Reason("steps in flight", "it is a row of the next plan")
