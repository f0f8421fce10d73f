"""What the results of a step change."""

from __future__ import annotations

from array import array

from ...messages.errors import ModelNumericsError, RequestFailedError
from ...messages.step import StepExecuted
from ...messages.system import ExecutorFailed
from .ending import end
from .result_check import find_fault
from .sequence import State
from .state import SchedulerState


def take_results(state: SchedulerState, executed: StepExecuted) -> None:
    """Give requests the tokens that they sampled, pass the results on, and end those that are done.

    Results that are late or told again are dropped. Those that cannot be (malformed, or the ones before are missing)
    are dropped too, and the executor is told of as failed: once an epoch, and it is not listened to any more. So are
    those in which no row came to numbers, but only once (`NumericsWatch`).
    """
    in_flight = state.in_flight
    if (
        executed.epoch != state.epoch
        or executed.step_id <= state.last_executed_step_id
        or state.faulty_epoch == state.epoch
    ):
        state.num_dropped_messages += 1
        return
    fault = (
        find_fault(in_flight[0], executed, state.config.vocab_size)
        if in_flight
        else f"it answers step {executed.step_id}, which was not asked for"
    )
    if fault:
        state.num_dropped_messages += 1
        state.num_faulty_results += 1
        state.faulty_epoch = state.epoch
        state.out.append(ExecutorFailed(state.epoch, f"the results of a step make no sense: {fault}"))
        return
    if (executed.nonfinite or state.numerics.is_alarmed) and state.numerics.hear(executed, state.sequences):
        # Nobody has heard of this step: after the loss it is done again.
        state.num_numerics_losses += 1
        state.faulty_epoch = state.epoch
        why = f"no row of a step came to numbers: {executed.failed[0][1]}"
        state.out.append(ExecutorFailed(state.epoch, why, is_numerics=True))
        return
    # Before whatever is concluded from it.
    state.out.append(executed)
    step = in_flight.popleft()
    state.last_executed_step_id = step.step_id
    token_arrays = step.token_arrays
    if executed.request_ids != step.sampling_ids:  # rows failed
        by_id = dict(zip(step.sampling_ids, token_arrays, strict=True))
        token_arrays = [by_id[request_id] for request_id in executed.request_ids]
    state.num_generation_tokens += len(token_arrays)
    # Per step and row: `append` returns None, so `any` calls it for all of them without leaving C.
    any(map(array.append, token_arrays, executed.token_ids))
    state.last_sampled_ids = executed.request_ids
    if state.seat_limit < state.most_seats and token_arrays:
        _raise_seat_limit(state, len(token_arrays))
    for request_id in executed.stopped:
        stopped = state.sequences.get(request_id)
        if stopped is not None:
            end(state, stopped, "stop", stop_token_id=stopped.tokens[-1])
    for request_id, error in executed.failed:
        failed = state.sequences.get(request_id)
        if failed is not None:
            is_numerics = request_id in executed.nonfinite
            end(
                state,
                failed,
                "error",
                code=ModelNumericsError.code if is_numerics else RequestFailedError.code,
                error=error,
            )
    for finished in step.finishing:
        if finished.state is not State.ENDED:
            end(state, finished, "length")


def _raise_seat_limit(state: SchedulerState, num_sampled: int) -> None:
    """Let more run again after a loss, once as many as may, or all there are, have sampled together."""
    if not state.trusted_ids.issuperset(state.last_sampled_ids):
        live = state.sequences
        state.trusted_ids = frozenset(
            [request_id for request_id in (*state.trusted_ids, *state.last_sampled_ids) if request_id in live]
        )
    limit, most = state.seat_limit, state.most_seats
    if not state.num_waiting and not state.prompts and not state.num_matching:
        limit = most
    elif num_sampled >= limit:
        limit = (limit + state.bad_seat_limit + 1) // 2 if limit < state.bad_seat_limit else min(2 * limit, most)
    if limit == most:
        state.trusted_ids = frozenset(state.last_sampled_ids)
        state.bad_seat_limit = 0
    state.seat_limit = limit
