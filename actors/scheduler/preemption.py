"""Who gives up blocks and seat, and for whom.

A request in need of a block takes it from the worst one running, never from a better one (then it waits), so the best
one always goes on and every request ends.
"""

from __future__ import annotations

from operator import attrgetter

from .sequence import Sequence, State
from .state import SchedulerState

_by_key = attrgetter("key")


def leave_ready(state: SchedulerState, sequence: Sequence) -> None:
    """Take a ready request from the prompts; its pinned prefix is released at once."""
    state.prompts.remove(sequence)
    state.leave_seat(sequence)
    state.credit += sequence.num_promised
    sequence.num_promised = 0
    state.release_match(sequence)


def stop_running(state: SchedulerState, sequence: Sequence, *, forget: bool = False) -> None:
    """Take a running request out of the batch; its blocks are released with the next plan.

    Args:
        forget: its KV must not be reused.
    """
    if sequence.is_decoding:
        state.decoding.remove(sequence)
    else:
        state.prompts.remove(sequence)
    state.leave_seat(sequence)
    state.credit += sequence.num_promised
    sequence.num_promised = 0
    token_ids = b""
    if not forget and state.config.enable_prefix_caching:
        # A row in flight may still fail, and nobody would hear of it: behind the newest token nothing is certain.
        token_ids = sequence.tokens[: min(sequence.num_computed, len(sequence.tokens) - 1)].tobytes()
    state.releases.append((sequence.request_id, token_ids))


def preempt(state: SchedulerState, sequence: Sequence) -> None:
    """Send a ready or running request back to the queue; it keeps its tokens and loses its blocks."""
    if sequence.state is State.READY:
        leave_ready(state, sequence)
    else:
        stop_running(state, sequence)
        for step in state.in_flight:
            if sequence in step.sampling or sequence in step.computing:
                sequence.last_step_id = step.step_id
        sequence.num_preemptions += 1
        state.num_preemptions += 1
        state.unpark(sequence)
    sequence.num_computed = sequence.num_slots = 0
    state.enqueue(sequence)


def make_room(state: SchedulerState, sequence: Sequence, num_spare: int, *, needs_seat: bool) -> bool:
    """Preempt requests of a strictly worse priority for a waiting one that needs so many blocks.

    Returns:
        Whether it can be matched now; False also while what was preempted is on its way back.
    """
    if not any(priority > sequence.priority for priority in state.seats_by_priority):
        return False
    if state.is_owed_blocks and not needs_seat:
        return False
    holders = sorted([*state.prompts, *state.decoding.rows], key=_by_key)
    victims: list[Sequence] = []
    num_gained = 0
    while holders and (num_spare > state.credit + num_gained or (needs_seat and not victims)):
        victim = holders.pop()
        if victim.key < sequence.key:
            break
        if victim.priority > sequence.priority:
            victims.append(victim)
            num_gained += victim.num_promised + victim.num_slots // state.block_size
    if num_spare > state.credit + num_gained or (needs_seat and not victims):
        return False
    for victim in victims:
        preempt(state, victim)
    return num_spare <= state.credit


def can_grow(state: SchedulerState, sequence: Sequence) -> bool:
    """Find a block for a decoding request; False if it has to sit this step out."""
    if state.credit > 0:
        return True
    if state.is_owed_blocks:
        return False
    for ready in reversed(state.prompts):
        if ready.state is State.READY:
            preempt(state, ready)
            if state.credit > 0:
                return True
    if state.is_owed_blocks:
        return False
    victim = state.decoding.rows[-1]
    if state.prompts and state.prompts[-1].key > victim.key:
        victim = state.prompts[-1]
    if victim.key > sequence.key:
        preempt(state, victim)
    return False
