"""How a request ends, whatever it is doing."""

from __future__ import annotations

from ...messages.request import FinishReason, RequestEnded
from .preemption import leave_ready, stop_running
from .sequence import Sequence, State
from .state import NOBODY, SchedulerState


def end(
    state: SchedulerState,
    sequence: Sequence,
    reason: FinishReason,
    *,
    stop_token_id: int = -1,
    code: str = "",
    error: str = "",
) -> None:
    """End a request and say so; its blocks go back with the next plan."""
    was = sequence.state
    sequence.state = State.ENDED
    del state.sequences[sequence.request_id]
    if was is State.WAITING:
        state.waiting.discard(sequence)
        state.num_waiting_tokens -= sequence.num_queued_tokens
    elif was is State.PARKED:
        state.num_parked -= 1
        state.num_waiting_tokens -= sequence.num_queued_tokens
        leader = state.sequences.get(sequence.fork_of)
        if leader is not None and sequence in leader.siblings:
            leader.siblings.remove(sequence)
    elif was is State.MATCHING:
        # The answer to the match, then to this, will come, and settle the account.
        state.num_matching -= 1
        state.leave_seat(sequence)
        state.release_match(sequence)
    elif was is State.READY:
        leave_ready(state, sequence)
    else:
        stop_running(state, sequence, forget=reason == "error")
    state.unpark(sequence)
    if sequence.request_id in state.trusted_ids and state.seat_limit < state.most_seats:
        # Nobody else takes this seat: not more may join those trusted than were to be tried.
        state.seat_limit = max(1, state.seat_limit - 1)
        state.bad_seat_limit = max(0, state.bad_seat_limit - 1)
    state.num_ended += 1
    state.num_completed += reason in ("stop", "length")
    state.num_failed += reason == "error"
    state.num_cancelled += reason == "abort"
    state.out.append(
        RequestEnded(
            request_id=sequence.request_id,
            reason=reason,
            num_output_tokens=sequence.num_output_tokens,
            stop_token_id=stop_token_id,
            num_cached_tokens=sequence.num_cached_tokens,
            error_code=code,
            error=error,
            num_preemptions=sequence.num_preemptions,
            first_scheduled_ns=sequence.first_scheduled_ns,
        )
    )


def expire(state: SchedulerState) -> None:
    """End the requests whose deadline has passed."""
    for request_id in state.deadlines.pop_due(state.now_ns):
        sequence = state.sequences.get(request_id)
        if sequence is not None:
            state.expiring_id = request_id
            end(state, sequence, "abort")
    state.expiring_id = NOBODY
