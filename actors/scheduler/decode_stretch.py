"""Many laps of the ring at once, under virtual time: exactly what stepping through them would do."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from operator import itemgetter

from ...messages.ids import RequestId, StepId
from ...messages.step import DecodeStretch
from .admission import may_admit
from .config import MAX_GROWTH
from .decoding_rows import DecodingRows, num_blocks_ahead
from .sequence import TYPECODE, Sequence
from .state import SchedulerState
from .step_in_flight import StepInFlight

_by_step_and_key = itemgetter(0, 1)


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
    if state.has_plenty:
        return min(num_steps, _num_steps_of_plenty(state))
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


def _num_steps_of_plenty(state: SchedulerState) -> int:
    """Return for how many laps there are plenty of blocks, however the rows grow."""
    num_rounds = (state.credit - state.num_blocks_plenty) // (MAX_GROWTH * len(state.decoding.rows))
    return max(0, num_rounds * MAX_GROWTH * state.block_size - 1)


def _num_steps_paid_for(state: SchedulerState) -> int:
    """Return how many tokens every decoding request can grow by until the credit is spent, a block at a time."""
    block_size, clock, rows = state.block_size, state.decoding.clock, state.decoding.rows
    left = [sequence.num_slots - sequence.decode_base - clock for sequence in rows]  # steps before a block is needed

    def num_blocks(num_steps: int) -> int:
        return sum([-(-(num_steps - each) // block_size) for each in left if each < num_steps])

    most = max(left) + (state.credit // len(rows) + 1) * block_size  # by then every row has taken its share, and one
    return bisect_right(range(most + 1), state.credit, key=num_blocks) - 1


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
    decoding, block_size, has_plenty = state.decoding, state.block_size, state.has_plenty
    begin = decoding.clock + 1
    grown: list[tuple[int, tuple[int, int], Sequence]] = []  # a block each
    growing: list[Sequence] = []
    for first in range(min(num_steps, MAX_GROWTH * block_size)):  # by then a row has filled what it took before
        for sequence in decoding.pop_due(begin + first):
            if sequence.due_clock != begin + first:
                continue
            if sequence.decode_base + begin + first <= sequence.num_slots:
                decoding.schedule(sequence, begin + first + 1)
                continue
            growing.append(sequence)
            step_offset = first
            while step_offset < num_steps:
                num_blocks = num_blocks_ahead(sequence, block_size) if has_plenty else 1
                grown += [(step_offset, sequence.key, sequence)] * num_blocks
                sequence.num_slots += num_blocks * block_size
                step_offset += num_blocks * block_size
    grown.sort(key=_by_step_and_key)
    decoding.clock += num_steps
    for sequence in growing:
        decoding.schedule(sequence, decoding.clock + 1)
    state.credit -= len(grown)
    return [(step_offset, sequence.request_id) for step_offset, _, sequence in grown]
