"""What is left of a step's results that no message can carry."""

from __future__ import annotations

import msgspec

from ...messages.step import StepExecuted


def without_logprobs(executed: StepExecuted, why: str) -> StepExecuted:
    """The same results, but the rows that came with log-probabilities have failed: nothing else grows so large."""
    large = {row[0]: why for row in (*executed.logprobs, *executed.prompt_logprobs)}
    for request_id, _ in executed.failed:
        large.pop(request_id, None)
    kept = [
        (request_id, token_id)
        for request_id, token_id in zip(executed.request_ids, executed.token_ids, strict=True)
        if request_id not in large
    ]
    return msgspec.structs.replace(
        executed,
        request_ids=tuple(request_id for request_id, _ in kept),
        token_ids=tuple(token_id for _, token_id in kept),
        stopped=tuple(request_id for request_id in executed.stopped if request_id not in large),
        logprobs=(),
        prompt_logprobs=(),
        failed=(*executed.failed, *large.items()),
    )
