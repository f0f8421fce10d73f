"""Results that no message can carry."""

from __future__ import annotations

from octavo.actors.executor.oversized_step import without_logprobs
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.request import TokenLogprobs
from octavo.messages.step import StepExecuted

A, B, C, D = (RequestId(number) for number in range(4))
ENTRY = TokenLogprobs(token_id=1, logprob=-1.0, rank=1)


def test_rows_with_log_probabilities_fail_and_the_others_keep_their_tokens() -> None:
    step = StepExecuted(
        Epoch(1),
        StepId(2),
        (A, B, C),
        (10, 11, 12),
        stopped=(B, C),
        logprobs=((B, ENTRY),),
        prompt_logprobs=((D, 1, (ENTRY,)), (B, 1, (ENTRY,))),
        failed=((RequestId(9), "something else"),),
        execute_ns=5,
    )
    assert without_logprobs(step, "too much") == StepExecuted(
        Epoch(1),
        StepId(2),
        (A, C),
        (10, 12),
        stopped=(C,),
        failed=((RequestId(9), "something else"), (B, "too much"), (D, "too much")),
        execute_ns=5,
    )
