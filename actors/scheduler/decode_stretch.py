"""Many laps of the ring at once, under virtual time: exactly what stepping through them would do."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from ...messages.ids import RequestId, StepId
from ...messages.step import DecodeStretch
from .admission import may_admit
from .decoding_rows import DecodingRows
from .sequence import TYPECODE, Sequence
from .state import SchedulerState
from .step_in_flight import StepInFlight


def find_horizon(state: SchedulerState) -> int:
    """Return how many laps ahead each executes and plans one token for each decoding row, and nothing else."""
    decoding = state.decoding
    rows = decoding.rows
    if (
        not rows
        or len(state.in_flight) < state.config.pipeline_depth
        or state.prompts
        or state.is_owed_blocks
        or state.seat_limit < state.config.max_num_seqs
        or len(rows) > state.config.max_num_batched_tokens
        or not all(_samples_all(step, decoding) for step in state.in_flight)
        or may_admit(state)
    ):
        return 0
    # The last one plans the step that samples a request's last token: the step behind it has other rows.
    num_steps = decoding.first_end_clock() - decoding.clock
    if state.credit >= len(rows) * (num_steps // state.block_size + 1):
        return num_steps
    return min(num_steps, _num_steps_paid_for(state))


def _samples_all(step: StepInFlight, decoding: DecodingRows) -> bool:
    """Return whether the step's end will give each decoding row a token, and do nothing else.

    What was started or released with it was done when it was planned.
    """
    if step.finishing or step.computing:
        return False
    ids = step.sampling_ids
    return ids is decoding.request_ids or (
        len(ids) == len(decoding.rows) and sorted(ids) == sorted(decoding.request_ids)
    )


def _num_steps_paid_for(state: SchedulerState) -> int:
    """Return how many tokens every decoding request can grow by until the credit is spent."""
    rows = state.decoding.rows
    num_rounds, num_left = divmod(state.credit, len(rows))  # in a round every row takes a block
    slots_left = sorted([sequence.num_slots - sequence.decode_base for sequence in rows])
    return num_rounds * state.block_size + slots_left[num_left] - state.decoding.clock


def advance(state: SchedulerState, num_steps: int, token_of: Callable[[RequestId], int]) -> DecodeStretch:
    """Do what so many laps would have done, had every row sampled the same token each time."""
    decoding = state.decoding
    grow = _grow(state, num_steps)
    request_ids = decoding.request_ids
    for request_id, token_ids in zip(request_ids, decoding.token_arrays, strict=True):
        token_ids.extend(array(TYPECODE, (token_of(request_id),)) * num_steps)
    first_step_id = StepId(state.next_step_id)
    state.next_step_id += num_steps
    state.num_steps += num_steps
    state.step_sizes.count(len(request_ids), num_steps)
    state.last_executed_step_id += num_steps
    state.num_generation_tokens += num_steps * len(request_ids)
    for i in range(max(0, num_steps - len(state.in_flight)), num_steps):
        state.in_flight.popleft()
        state.in_flight.append(
            StepInFlight(StepId(first_step_id + i), decoding.rows, decoding.request_ids, decoding.token_arrays)
        )
    if decoding.clock == decoding.first_end_clock():
        state.in_flight[-1].finishing = [
            sequence for sequence in decoding.rows if sequence.decode_base + decoding.clock == sequence.max_total - 1
        ]
    return DecodeStretch(state.epoch, first_step_id, num_steps, request_ids, tuple(grow))


def _grow(state: SchedulerState, num_steps: int) -> list[tuple[int, RequestId]]:
    """Let the rows take the blocks for so many steps; return `(step_offset, request_id)` in the order of planning."""
    decoding, block_size = state.decoding, state.block_size
    begin = decoding.clock + 1
    # A row that needs a block needs one every `block_size` steps, so the first round of them tells the others.
    first_round: list[tuple[int, list[Sequence]]] = []
    for step_offset in range(min(num_steps, block_size)):
        clock = begin + step_offset
        growing = []
        for sequence in decoding.pop_due(clock):
            if sequence.due_clock == clock:
                if sequence.decode_base + clock > sequence.num_slots:
                    growing.append(sequence)
                else:
                    decoding.schedule(sequence, clock + 1)
        if growing:
            first_round.append((step_offset, growing))
    grow: list[tuple[int, RequestId]] = []
    for first in range(0, num_steps, block_size):
        for step_offset, growing in first_round:
            if first + step_offset < num_steps:
                grow += [(first + step_offset, sequence.request_id) for sequence in growing]
    decoding.clock += num_steps
    for step_offset, growing in first_round:
        num_slots = -(-(num_steps - step_offset) // block_size) * block_size
        for sequence in growing:
            sequence.num_slots += num_slots
            decoding.schedule(sequence, decoding.clock + 1)
    state.credit -= len(grow)
    return grow
