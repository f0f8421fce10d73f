"""Whether the results of a step can be what the executor was asked for."""

from __future__ import annotations

from itertools import chain

from ...messages.ids import RequestId
from ...messages.step import StepExecuted
from .sequence import Sequence, State
from .step_in_flight import StepInFlight

_MAX_TOKEN_ID = (1 << 31) - 1  # tokens are int32


def find_fault(step: StepInFlight, executed: StepExecuted, vocab_size: int) -> str:
    """Return what is wrong with a step's results; empty if nothing is.

    Whoever sampled has one token each, in the order of the step's rows; a row is missing only if it failed or if its
    request has ended; and nothing is said of requests that are not in the step. The usual step costs one comparison of
    tuples, a `min` and a `max`.

    Args:
        step: the oldest in flight.
        executed: of the step's epoch.
        vocab_size: token ids are below it; 0: unknown.
    """
    request_ids, token_ids = executed.request_ids, executed.token_ids
    if executed.step_id != step.step_id:
        return f"it answers step {executed.step_id}, and step {step.step_id} comes first"
    if len(token_ids) != len(request_ids):
        return f"{len(token_ids)} tokens for {len(request_ids)} rows"
    if token_ids:
        limit = (vocab_size or _MAX_TOKEN_ID + 1) - 1
        if min(token_ids) < 0 or max(token_ids) > limit:
            token_id = next(token_id for token_id in token_ids if not 0 <= token_id <= limit)
            return f"token {token_id} is none: they go from 0 to {limit}"
    if request_ids != step.sampling_ids:
        fault = _find_wrong_row(step, executed)
        if fault:
            return fault
    if executed.execute_ns < 0:
        return f"it took {executed.execute_ns} ns"
    if executed.stopped or executed.failed or executed.logprobs or executed.prompt_logprobs or executed.nonfinite:
        return _find_wrong_remark(step, executed, vocab_size)
    return ""


def _find_wrong_row(step: StepInFlight, executed: StepExecuted) -> str:
    rows = iter(step.sampling_ids)
    for request_id in executed.request_ids:
        if request_id not in rows:  # reads on, so order and repetition count
            return f"request {request_id} sampled out of turn, twice, or not at all in this step"
    answered = frozenset(chain(executed.request_ids, (request_id for request_id, _ in executed.failed)))
    for sequence in step.sampling:
        if sequence.request_id not in answered and sequence.state is not State.ENDED:
            return f"request {sequence.request_id} has no token"
    return ""


def _find_wrong_remark(step: StepInFlight, executed: StepExecuted, vocab_size: int) -> str:
    """What is said beside the tokens; for the rows that stop, fail, or asked for log-probabilities."""
    sampled = frozenset(executed.request_ids)
    for request_id in chain(executed.stopped, (request_id for request_id, _ in executed.logprobs)):
        if request_id not in sampled:
            return f"a remark on request {request_id}, which sampled nothing"
    if executed.failed or executed.prompt_logprobs or executed.nonfinite:
        rows: dict[RequestId, Sequence] = {
            sequence.request_id: sequence for sequence in chain(step.sampling, step.computing)
        }
        for request_id, _ in executed.failed:
            if request_id not in rows:
                return f"request {request_id} failed, which is not in the step"
        if executed.nonfinite and not {request_id for request_id, _ in executed.failed}.issuperset(executed.nonfinite):
            return "logits that are no numbers of a request that did not fail"
        for request_id, first_position, entries in executed.prompt_logprobs:
            if request_id not in rows:
                return f"log-probabilities of the prompt of request {request_id}, which is not in the step"
            if not 1 <= first_position <= first_position + len(entries) <= rows[request_id].num_prompt:
                return f"log-probabilities past the prompt of request {request_id}"
    limit = (vocab_size or _MAX_TOKEN_ID + 1) - 1
    positions = chain(
        (entry for _, entry in executed.logprobs),
        (entry for _, _, entries in executed.prompt_logprobs for entry in entries),
    )
    for entry in positions:
        likely = (entry.token_id, *(token_id for token_id, _ in entry.top)) if entry.top else (entry.token_id,)
        if min(likely) < 0 or max(likely) > limit:
            return f"a log-probability of token {max(likely)}: they go from 0 to {limit}"
    return ""
