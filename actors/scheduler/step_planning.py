"""What the next step computes.

A request has tokens, and a number of them that are computed; every row of a step computes some more, and samples a
token when it reaches the last known one. There is no prefill or decode phase: a decoding row is one with a single known
token to compute. With several steps in flight a row may be planned before the token it computes is known: the executor
takes it from the step before.
"""

from __future__ import annotations

from ...messages.ids import RequestId, StepId
from ...messages.step import PlanStep, StartRequest
from .admission import admit
from .decoding_rows import num_blocks_ahead
from .preemption import can_grow
from .sequence import Sequence, State
from .start_size import MAX_START_BYTES, start_bytes
from .state import SchedulerState
from .step_in_flight import StepInFlight

_Grow = list[tuple[RequestId, int]]


class _PromptRows:
    """The rows behind the decoding ones: first those of one token, as if decoding, then longer chunks."""

    __slots__ = ("chunk_ids", "chunk_sampling", "chunks", "computed", "one_ids", "one_sampling", "start")

    def __init__(self) -> None:
        self.start: list[StartRequest] = []
        self.computed: list[tuple[RequestId, int]] = []
        self.one_ids: list[RequestId] = []
        self.one_sampling: list[Sequence] = []
        self.chunk_ids: list[RequestId] = []
        self.chunks: list[int] = []
        self.chunk_sampling: list[Sequence] = []


def plan_steps(state: SchedulerState) -> None:
    """Plan as long as the pipeline has room and there is something to do, and admit those who wait."""
    while True:
        is_planned = _has_room(state) and _plan_step(state)
        admit(state)
        if not is_planned and not (state.releases and _has_room(state)):
            return


def _has_room(state: SchedulerState) -> bool:
    """Whether to plan now. A match is answered long before a step is done: better full than soon."""
    if not state.in_flight:
        return True
    return len(state.in_flight) < state.config.pipeline_depth and not state.matching


def _plan_step(state: SchedulerState) -> bool:
    """Plan one step; False if there is nothing to do or to release."""
    grow: _Grow = []
    num_prompt_tokens = state.num_prompt_tokens
    step = _plan_decoding(state, grow)
    plan = _plan_prompts(state, step, grow) if state.prompts else _make_plan(state, step, grow)
    if not plan.request_ids and not plan.release:
        return False
    state.next_step_id += 1
    state.num_steps += 1
    if plan.request_ids:
        num_decoding = len(plan.request_ids) - len(plan.computed_prompt_tokens)
        state.step_sizes.count(num_decoding + state.num_prompt_tokens - num_prompt_tokens)
    state.num_releases_owed += len(state.releases)
    state.releases = []
    state.in_flight.append(step)
    state.out.append(plan)
    return True


def _make_plan(state: SchedulerState, step: StepInFlight, grow: _Grow) -> PlanStep:
    """Return the plan of decoding rows alone."""
    request_ids = step.sampling_ids
    return PlanStep(
        state.epoch, step.step_id, request_ids, (1,) * len(request_ids), (), tuple(grow), tuple(state.releases)
    )


# -- decoding rows ----------------------------------------------------------------------------------------------------


def _plan_decoding(state: SchedulerState, grow: _Grow) -> StepInFlight:
    """Plan one token for every decoding request that the budget and the blocks allow."""
    decoding = state.decoding
    budget = state.config.max_num_batched_tokens
    beyond = decoding.rows[budget:]
    finishing: list[Sequence] = []
    idle: list[Sequence] = []
    next_clock = decoding.clock + 1
    block_size, plenty = state.block_size, state.num_blocks_plenty
    for sequence in decoding.pop_due(next_clock):
        if sequence.due_clock != next_clock or (beyond and sequence in beyond):
            continue  # preempted by one before it, or not in this step
        num_computed = sequence.decode_base + next_clock
        if sequence.num_slots < num_computed < sequence.max_total - 1 and state.credit > 0:
            # As below for nearly all of them, without the calls, but for several blocks at once where there are plenty.
            num_blocks = num_blocks_ahead(sequence, block_size) if state.credit > plenty else 1
            state.credit -= num_blocks
            sequence.num_slots += num_blocks * block_size
            grow.append((sequence.request_id, num_blocks))
        elif num_computed >= sequence.max_total - 1:  # computing so many samples the last token
            is_row = num_computed == sequence.max_total - 1 and _has_slot(state, sequence, num_computed, grow)
            (finishing if is_row else idle).append(sequence)
        elif not _has_slot(state, sequence, num_computed, grow):
            idle.append(sequence)
        decoding.schedule(sequence, next_clock + 1)
    step_id = StepId(state.next_step_id)
    if beyond or idle:
        step = _leave_out(state, idle, step_id)
    else:
        step = StepInFlight(step_id, decoding.rows, decoding.request_ids, decoding.token_arrays)
    decoding.clock = next_clock
    step.finishing = finishing
    return step


def _has_slot(state: SchedulerState, sequence: Sequence, num_computed: int, grow: _Grow) -> bool:
    """Give a decoding row a block if it needs one for so many tokens; False if there is none to give."""
    if num_computed > sequence.num_slots:
        if state.credit <= 0 and not can_grow(state, sequence):
            return False
        state.credit -= 1
        sequence.num_slots += state.block_size
        grow.append((sequence.request_id, 1))
    return True


def _leave_out(state: SchedulerState, idle: list[Sequence], step_id: StepId) -> StepInFlight:
    """Return a step without these rows and without those beyond the budget."""
    decoding = state.decoding
    left_out = [sequence for sequence in idle if sequence.is_decoding]  # not preempted meanwhile
    left_out += decoding.rows[state.config.max_num_batched_tokens :]
    step = StepInFlight(step_id, *decoding.without(left_out))
    for sequence in left_out:
        decoding.sit_out(sequence)
    return step


# -- prompts ----------------------------------------------------------------------------------------------------------


def _plan_prompts(state: SchedulerState, step: StepInFlight, grow: _Grow) -> PlanStep:
    """Plan chunks of prompts, by key, with what the decoding rows leave of the budget; return the whole plan."""
    rows = _PromptRows()
    num_start_bytes = 0
    num_decoding = len(step.sampling_ids)
    budget = state.config.max_num_batched_tokens - num_decoding
    for sequence in state.prompts:
        if budget <= 0:
            break
        if sequence.state is State.READY:
            num_start_bytes += start_bytes(sequence)
            if rows.start and num_start_bytes > MAX_START_BYTES:
                break  # the budget counts what is computed, the message holds cached tokens as well
            rows.start.append(_start(state, sequence))
        chunk = min(len(sequence.tokens) - sequence.num_computed, budget, state.chunk_limit)
        budget -= chunk
        _plan_chunk(state, sequence, chunk, grow)
        rows.computed.append((sequence.request_id, sequence.num_computed))
        is_sampling = sequence.num_computed == len(sequence.tokens)
        if not is_sampling:
            step.computing.append(sequence)
        elif sequence.num_computed >= sequence.max_total - 1:
            step.finishing.append(sequence)
        if chunk == 1:
            rows.one_ids.append(sequence.request_id)
            if is_sampling:
                rows.one_sampling.append(sequence)
        else:
            rows.chunk_ids.append(sequence.request_id)
            rows.chunks.append(chunk)
            if is_sampling:
                rows.chunk_sampling.append(sequence)
    if not rows.computed:
        return _make_plan(state, step, grow)
    request_ids = (*step.sampling_ids, *rows.one_ids, *rows.chunk_ids)
    late_sampling = rows.one_sampling + rows.chunk_sampling
    if late_sampling:
        are_all = step.sampling is state.decoding.rows
        _move_to_decoding(state)
        decoding = state.decoding
        if are_all and decoding.request_ids == request_ids:  # as if it were the next step: nothing has to be made twice
            step.sampling, step.token_arrays = decoding.rows, decoding.token_arrays
            step.sampling_ids = request_ids = decoding.request_ids
        else:
            step.sampling = step.sampling + late_sampling
            step.sampling_ids += tuple([sequence.request_id for sequence in late_sampling])
            step.token_arrays = step.token_arrays + [sequence.tokens for sequence in late_sampling]
    return PlanStep(
        epoch=state.epoch,
        step_id=step.step_id,
        request_ids=request_ids,
        num_tokens=(1,) * (num_decoding + len(rows.one_ids)) + tuple(rows.chunks),
        start=tuple(rows.start),
        grow=tuple(grow),
        release=tuple(state.releases),
        computed_prompt_tokens=tuple(rows.computed),
    )


def _plan_chunk(state: SchedulerState, sequence: Sequence, chunk: int, grow: _Grow) -> None:
    """Count a chunk of a prompt as computed, in blocks that were promised for it."""
    sequence.num_computed += chunk
    if sequence.num_computed > sequence.num_slots:
        num_blocks = -(-(sequence.num_computed - sequence.num_slots) // state.block_size)
        sequence.num_promised -= num_blocks
        sequence.num_slots += num_blocks * state.block_size
        grow.append((sequence.request_id, num_blocks))
    state.num_prompt_tokens += chunk
    state.set_backlog(sequence, len(sequence.tokens) - sequence.num_computed)


def _start(state: SchedulerState, sequence: Sequence) -> StartRequest:
    sequence.state = State.RUNNING
    if not sequence.first_scheduled_ns:
        sequence.first_scheduled_ns = state.now_ns
    return StartRequest(
        request_id=sequence.request_id,
        token_ids=sequence.tokens.tobytes(),
        num_prompt_tokens=sequence.num_prompt,
        num_computed_tokens=sequence.num_computed,
        params=sequence.submit.params,
        eos_token_ids=sequence.submit.eos_token_ids,
    )


def _move_to_decoding(state: SchedulerState) -> None:
    """Move requests whose known tokens are all computed to the decoding ones."""
    left = []
    for sequence in state.prompts:
        if sequence.num_computed < len(sequence.tokens):
            left.append(sequence)
        else:
            state.decoding.add(sequence)
            state.unpark(sequence)
    state.prompts = left
