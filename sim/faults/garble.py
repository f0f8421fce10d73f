"""Results of a step that cannot be."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from ...messages.ids import RequestId
from ...messages.request import TokenLogprobs
from ...messages.step import StepExecuted

_STRANGER = RequestId(1 << 40)

_WAYS: tuple[Callable[[StepExecuted, int], StepExecuted], ...] = (
    lambda step, _: replace(step, request_ids=step.request_ids[:-1], token_ids=step.token_ids[:-1]),
    lambda step, _: replace(step, token_ids=step.token_ids[:-1]),
    lambda step, _: replace(step, token_ids=(*step.token_ids, 1)),
    lambda step, _: replace(
        step, request_ids=(*step.request_ids, step.request_ids[0]), token_ids=(*step.token_ids, step.token_ids[0])
    ),
    lambda step, _: replace(step, request_ids=(_STRANGER, *step.request_ids[1:])),
    lambda step, _: replace(step, token_ids=(-1, *step.token_ids[1:])),
    lambda step, vocab: replace(step, token_ids=(*step.token_ids[:-1], vocab)),
    lambda step, _: replace(step, token_ids=(1 << 31, *step.token_ids[1:])),
    lambda step, _: replace(step, stopped=(*step.stopped, _STRANGER)),
    lambda step, _: replace(step, failed=((_STRANGER, "not a number"), *step.failed)),
    lambda step, _: replace(step, logprobs=((_STRANGER, TokenLogprobs(1, -1.0, 1)),)),
    lambda step, _: replace(step, prompt_logprobs=((_STRANGER, 1, ()), *step.prompt_logprobs)),
    lambda step, _: replace(step, prompt_logprobs=((step.request_ids[0], 1 << 30, ()), *step.prompt_logprobs)),
    lambda step, vocab: replace(step, logprobs=((step.request_ids[0], TokenLogprobs(vocab, -1.0, 1)),)),
    lambda step, _: replace(step, execute_ns=-1),
)

NUM_WAYS = len(_WAYS)


def garble(executed: StepExecuted, way: int, vocab: int) -> StepExecuted:
    """Return results that no executor may say, made of right ones that have a row at least.

    Args:
        way: below `NUM_WAYS`.
        vocab: token ids are below it.
    """
    return _WAYS[way](executed, vocab)
