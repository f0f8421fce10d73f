"""Who is accepted, and who of those waiting gets a seat."""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from ...messages.errors import (
    ContextLengthExceededError,
    EngineClosedError,
    InvalidRequestError,
    QueueFullError,
    RequestQuarantinedError,
)
from ...messages.ids import RequestId
from ...messages.kv import MatchPrefix, PrefixMatched
from ...messages.request import FinishReason, RequestEnded, SubmitRequest
from .preemption import make_room
from .quarantine import REFUSAL
from .sequence import Sequence, State
from .state import SchedulerState

_by_key = attrgetter("key")


def submit(state: SchedulerState, request: SubmitRequest) -> None:
    """Accept a request or refuse it."""
    if request.request_id in state.sequences:
        state.num_dropped_messages += 1
        return
    sequence = Sequence(request, state.max_len, state.config.priority_aging_ns)
    refusal = _find_refusal(state, sequence)
    if refusal is not None:
        code, text = refusal
        state.num_refused += 1
        state.out.append(RequestEnded(request.request_id, "refused", error_code=code, error=text))
        return
    state.num_accepted += 1
    state.num_resumed += request.is_taken_up_again
    reason, stop_token_id = _find_end(sequence)
    if reason is not None:
        state.num_ended += 1
        state.num_completed += 1
        state.out.append(RequestEnded(request.request_id, reason, sequence.num_output_tokens, stop_token_id))
        return
    state.sequences[request.request_id] = sequence
    if request.deadline_ns:
        state.deadlines.add(request.deadline_ns, request.request_id, state.sequences)
    leader = state.sequences.get(request.fork_of)
    if leader is not None and not leader.has_prompt:
        state.park(sequence, leader)
    else:
        state.enqueue(sequence)


def _find_refusal(state: SchedulerState, sequence: Sequence) -> tuple[str, str] | None:
    """Return code and text of why a request is not served, or None."""
    config = state.config
    is_new = not sequence.submit.is_taken_up_again  # those others were accepted before, and wait for no bound
    if is_new and state.is_draining:
        return EngineClosedError.code, "the engine is shutting down: send the request elsewhere"
    if sequence.num_prompt == 0:
        return InvalidRequestError.code, "the prompt is empty: it needs at least one token"
    if sequence.num_prompt >= state.max_len:
        return ContextLengthExceededError.code, (
            f"the prompt has {sequence.num_prompt} tokens, but with room for one output token at most "
            f"{state.max_len - 1} fit (max_model_len={config.max_model_len}; the KV cache holds {config.num_blocks} "
            f"blocks of {config.block_size} = {config.num_blocks * config.block_size} tokens): shorten the prompt"
        )
    # Whether an earlier engine accepted one without output is not known: it may have died before.
    if (is_new or not sequence.submit.output_token_ids) and state.quarantine.holds(sequence.submit, state.now_ns):
        return RequestQuarantinedError.code, REFUSAL
    if is_new and _find_end(sequence)[0] is None:
        text = _describe_full_queue(state, len(sequence.tokens))
        if text:
            return QueueFullError.code, text
    return None


def _find_end(sequence: Sequence) -> tuple[FinishReason | None, int]:
    """Return why a request that is submitted is at its end already, and the token that ended it (-1: none).

    One that is taken up again may have all its tokens: only the news of its end was lost.
    """
    tokens, params = sequence.tokens, sequence.submit.params
    num_outputs = len(tokens) - sequence.num_prompt
    if (
        num_outputs > 0
        and num_outputs >= params.min_tokens
        and (tokens[-1] in sequence.submit.eos_token_ids or tokens[-1] in params.stop_token_ids)
    ):
        return "stop", tokens[-1]
    if len(tokens) >= sequence.max_total and (num_outputs or params.prompt_logprobs is None):
        return "length", -1
    return None, -1


def _describe_full_queue(state: SchedulerState, num_tokens: int) -> str:
    """Return why a request with so many tokens may not wait, or nothing.

    Those at the head of the queue for whom there are free seats do not count: they are about to leave it.
    """
    config = state.config
    num_waiting = state.num_waiting
    num_free_seats = max(0, state.seat_limit - state.num_seats)
    is_full_of_requests = num_waiting >= config.max_num_queued_requests + num_free_seats
    is_full_of_tokens = num_waiting > 0 and state.num_waiting_tokens + num_tokens > config.max_num_queued_tokens
    if not is_full_of_requests and not is_full_of_tokens:
        return ""
    return (
        f"{num_waiting} requests with {state.num_waiting_tokens} tokens wait already "
        f"(limits: {config.max_num_queued_requests} and {config.max_num_queued_tokens}): try again later"
    )


def admit(state: SchedulerState) -> None:
    """Ask for the cached prefixes of as many waiting requests as the next step could take.

    Not of more: a prefix that is computed meanwhile would be missed.
    """
    while True:
        sequence = state.waiting.peek()
        if sequence is None or sequence.last_step_id > state.last_executed_step_id:
            return  # nobody, or tokens sampled before its preemption are still under way
        if state.backlog >= state.config.max_num_batched_tokens and not (
            state.prompts and sequence.key < state.prompts[-1].key
        ):
            return
        num_blocks = -(-len(sequence.tokens) // state.block_size)
        num_seats = state.num_seats
        needs_seat = num_seats >= state.seat_limit
        num_spare = num_blocks + (state.watermark if num_seats else 0)
        if (needs_seat or num_spare > state.credit) and not make_room(
            state, sequence, num_spare, needs_seat=needs_seat
        ):
            return
        state.waiting.pop()
        state.num_waiting_tokens -= sequence.num_queued_tokens
        _match(state, sequence, num_blocks)


def may_admit(state: SchedulerState) -> bool:
    """Whether the head of the queue could be admitted while nothing but growth happens, by which it only loses."""
    sequence = state.waiting.peek()
    if sequence is None:
        return False
    num_spare = -(-len(sequence.tokens) // state.block_size) + state.watermark
    is_held_up = state.num_seats >= state.seat_limit or num_spare > state.credit
    return not is_held_up or any(priority > sequence.priority for priority in state.seats_by_priority)


def _match(state: SchedulerState, sequence: Sequence, num_blocks: int) -> None:
    leader = state.sequences.get(sequence.fork_of)
    params = sequence.submit.params
    sequence.state = State.MATCHING
    sequence.num_promised = num_blocks
    state.credit -= num_blocks
    state.set_backlog(sequence, len(sequence.tokens))
    state.take_seat(sequence)
    state.num_matching += 1
    state.matching[sequence.request_id] = sequence
    state.out.append(
        MatchPrefix(
            epoch=state.epoch,
            request_id=sequence.request_id,
            token_ids=sequence.tokens.tobytes(),
            cache_salt=sequence.submit.cache_salt,
            fork_of=sequence.fork_of if leader is not None and leader.has_prompt else RequestId(-1),
            # Once there is output, the prompt's log-probabilities have been reported.
            skip_cache=params.prompt_logprobs is not None and len(sequence.tokens) == sequence.num_prompt,
        )
    )


def take_match(state: SchedulerState, matched: PrefixMatched) -> None:
    """Let a request whose prefix is found and pinned run."""
    if matched.epoch != state.epoch:
        state.num_dropped_messages += 1
        return
    sequence = state.matching.pop(matched.request_id)
    if sequence.state is State.ENDED:
        state.credit += sequence.num_promised - matched.num_blocks_taken
        return
    num_cached_blocks = matched.num_cached_tokens // state.block_size
    # Of what was reserved, the pinned blocks nobody held are spent, the missing ones stay promised.
    state.credit += num_cached_blocks - matched.num_blocks_taken
    sequence.num_promised -= num_cached_blocks
    sequence.num_slots = sequence.num_computed = matched.num_cached_tokens
    sequence.state = State.READY
    state.num_matching -= 1
    state.set_backlog(sequence, len(sequence.tokens) - matched.num_cached_tokens)
    insort(state.prompts, sequence, key=_by_key)
    if not sequence.is_matched_before:
        sequence.is_matched_before = True
        sequence.num_cached_tokens = min(matched.num_cached_tokens, sequence.num_prompt)
        state.prefix_cache_queries += len(sequence.tokens)
        state.prefix_cache_hits += matched.num_cached_tokens
