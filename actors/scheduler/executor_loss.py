"""What happens when the executor is lost, and who is held to be the cause."""

from __future__ import annotations

from operator import attrgetter

from ...messages.errors import OutOfMemoryError, RequestQuarantinedError
from ...messages.ids import RequestId
from ...messages.kv import ResetBlocks
from ...messages.system import ExecutorLost
from .ending import end
from .sequence import Sequence, State
from .state import SchedulerState


def lose_executor(state: SchedulerState, lost: ExecutorLost) -> None:
    """Send everything that runs back to the queue, under the new epoch."""
    if lost.epoch <= state.epoch:
        state.num_dropped_messages += 1
        return
    state.epoch = lost.epoch
    state.num_executor_losses += 1
    in_flight: dict[RequestId, Sequence] = {}
    gone: dict[RequestId, Sequence] = {}  # ended while they were in flight
    for step in state.in_flight:
        for sequence in (*step.sampling, *step.computing):
            (gone if sequence.state is State.ENDED else in_flight)[sequence.request_id] = sequence
    state.in_flight.clear()
    state.last_executed_step_id = state.next_step_id - 1
    state.out.append(ResetBlocks(state.epoch))
    returning = [*state.decoding.rows, *state.prompts]
    returning.extend(sequence for sequence in state.matching.values() if sequence.state is State.MATCHING)
    state.decoding.clear()
    state.prompts = []
    state.matching = {}
    state.num_matching = 0
    state.releases = []
    state.num_releases_owed = 0
    state.credit = state.config.num_blocks
    state.num_requeued += len(returning)
    for sequence in returning:
        state.leave_seat(sequence)
        sequence.num_promised = sequence.num_computed = sequence.num_slots = 0
        state.enqueue(sequence)
    for sequence in returning:
        if sequence.state is State.WAITING:
            state.unpark(sequence)
    if lost.is_out_of_memory:
        _take_less(state, list(in_flight.values()), lost.why)
    elif not lost.is_innocent:
        _blame(state, list(in_flight.values()), list(gone.values()), lost.why)


def _take_less(state: SchedulerState, too_many: list[Sequence], why: str) -> None:
    """From now on no more run together than half of those that took too much memory; one that does so alone ends."""
    if len(too_many) == 1:
        error = f"the device has no memory for this request, even alone: {why}"
        end(state, too_many[0], "error", code=OutOfMemoryError.code, error=error)
    elif too_many:
        state.most_seats = len(too_many) // 2
        state.seat_limit = min(state.seat_limit, state.most_seats)


def _blame(state: SchedulerState, suspects: list[Sequence], gone: list[Sequence], why: str) -> None:
    """Count a loss against those in flight; end the one that must be its cause.

    A single loss is an accident, and all go on together. If it happens again, the cause is searched for by bisection:
    those that sampled together since are trusted, the others are newcomers to them, of whom half may join. So the one
    that causes the losses, be it alone or in company, is the only newcomer after at most 2 + log2(batch) losses, while
    those trusted gain tokens. It is convicted once it has been in flight at more losses in a row, without a token
    between them, than an accident would explain. If all are trusted, it was another accident. While one that was under
    the same suspicion has just left (cancelled, or out of time), nobody is convicted in its place.
    """
    if not suspects:
        return
    for sequence in suspects:
        if len(sequence.tokens) > sequence.num_tokens_at_loss:
            sequence.num_losses = 0
        sequence.num_losses += 1
        sequence.num_tokens_at_loss = len(sequence.tokens)
    if state.last_sampled_ids:
        state.trusted_ids = state.trusted_ids.union(state.last_sampled_ids)
        state.last_sampled_ids = ()
    newcomers = [sequence for sequence in suspects if sequence.request_id not in state.trusted_ids]
    if not newcomers:
        state.trusted_ids = frozenset()
        newcomers = suspects
    worst = max(newcomers, key=attrgetter("num_losses"))
    if worst.num_losses > 1:
        state.seat_limit = max(1, len(suspects) - len(newcomers) + len(newcomers) // 2)
        state.bad_seat_limit = len(suspects)
    is_alone = sum(sequence.num_losses == worst.num_losses for sequence in newcomers) == 1 and not any(
        sequence.num_losses + 1 >= worst.num_losses and len(sequence.tokens) == sequence.num_tokens_at_loss
        for sequence in gone
    )
    if is_alone and worst.num_losses > state.config.max_executor_losses:
        state.quarantine.add(worst.submit, state.now_ns)
        state.num_quarantined += 1
        end(
            state,
            worst,
            "error",
            code=RequestQuarantinedError.code,
            error=f"the executor was lost {worst.num_losses} times in a row while computing this request: {why}",
        )
        state.bad_seat_limit = 0
        for sequence in state.sequences.values():
            sequence.num_losses = 0  # those losses are explained; the next ones may have another cause
