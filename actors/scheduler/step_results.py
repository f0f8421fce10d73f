"""What the results of a step change."""

from __future__ import annotations

from array import array

from ...messages.errors import RequestFailedError
from ...messages.step import StepExecuted
from .ending import end
from .sequence import State
from .state import SchedulerState


def take_results(state: SchedulerState, executed: StepExecuted) -> None:
    """Give requests the tokens that they sampled, and end those that are done."""
    in_flight = state.in_flight
    if executed.epoch != state.epoch or not in_flight or in_flight[0].step_id != executed.step_id:
        state.num_dropped_messages += 1
        return
    step = in_flight.popleft()
    state.last_executed_step_id = step.step_id
    token_arrays = step.token_arrays
    if executed.request_ids != step.sampling_ids:  # rows failed
        by_id = dict(zip(step.sampling_ids, token_arrays, strict=True))
        token_arrays = [by_id[request_id] for request_id in executed.request_ids]
    assert len(token_arrays) == len(executed.token_ids)
    state.num_generation_tokens += len(token_arrays)
    # Per step and row: `append` returns None, so `any` calls it for all of them without leaving C.
    any(map(array.append, token_arrays, executed.token_ids))
    for request_id in executed.stopped:
        stopped = state.sequences.get(request_id)
        if stopped is not None:
            end(state, stopped, "stop", stop_token_id=stopped.tokens[-1])
    for request_id, error in executed.failed:
        failed = state.sequences.get(request_id)
        if failed is not None:
            end(state, failed, "error", code=RequestFailedError.code, error=error)
    for finished in step.finishing:
        if finished.state is not State.ENDED:
            end(state, finished, "length")
    if state.seat_limit < state.config.max_num_seqs and token_arrays:
        state.seat_limit = min(state.seat_limit * 2, state.config.max_num_seqs)
