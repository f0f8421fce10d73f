"""How a batch of requests is sampled on the device, decided when the batch changes, and what its tokens then mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ....messages.ids import RequestId
from ....messages.request import TokenLogprobs
from ..sampler import SampledTokens
from .packed_step import Standing

Int64 = npt.NDArray[np.int64]

MAX_TOP_LOGPROBS = 32
"""Most alternatives that the device reports; more, or the whole vocabulary, go through the `Sampler`."""

TOP_LOGPROBS = (0, 4, 8, 16, MAX_TOP_LOGPROBS)
"""Counts that are computed: each request gets the first of what is computed for the one that asks for most."""

WHY_FAILED = "the model computed no usable logits for this request: NaN, infinity, or nothing finite"


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What is done with the logits of the requests that sample in a step.

    Attributes:
        request_ids: of each.
        any_stop: the tokens that end any of them, and perhaps others, as hardly a step has one of them.
        on_device: the device's sampler can do all of them; otherwise the `Sampler` does.
        num_top: alternatives computed beside each token, None for no log-probabilities.
        asked: `(index, num_top)` of the requests that report log-probabilities.
        reports_edited: of some of those the logits are changed, which log-probabilities are taken of as they were.
    """

    standing: Sequence[Standing]
    request_ids: tuple[RequestId, ...]
    any_stop: frozenset[int]
    on_device: bool
    num_top: int | None
    asked: tuple[tuple[int, int], ...]
    reports_edited: bool

    @property
    def num_words(self) -> int:
        """Of int64, that the device sends back."""
        num_top = self.num_top
        return len(self.standing) * (1 if num_top is None else 3 + 2 * num_top)


def plan_sampling(
    standing: Sequence[Standing],
    request_ids: tuple[RequestId, ...],
    vocab_size: int,
    *,
    any_stop: frozenset[int],
    has_special: bool,
) -> SamplingPlan:
    """Decide how these requests' tokens are chosen.

    Args:
        any_stop: the tokens that end any of these requests, and perhaps others.
        has_special: some of them may not be plain.
    """
    asked = []
    on_device, reports_edited = True, False
    for index, each in enumerate(standing if has_special else ()):
        if each.is_plain:
            continue
        sampling, logprobs = each.sampling, each.sampling.params.logprobs
        if logprobs is not None:
            asked.append((index, min(logprobs, vocab_size)))
            on_device &= 0 <= logprobs <= MAX_TOP_LOGPROBS
            reports_edited |= each.is_edited
        on_device &= not sampling.is_processed
    num_top = None
    if asked and on_device:
        most = max(count for _, count in asked)
        num_top = min(next(count for count in TOP_LOGPROBS if count >= most), vocab_size)
    return SamplingPlan(
        standing=standing,
        request_ids=request_ids,
        any_stop=any_stop,
        on_device=on_device,
        num_top=num_top,
        asked=tuple(asked),
        reports_edited=reports_edited,
    )


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step sampled, as in `StepExecuted`.

    Attributes:
        failed: rows from which no token could be chosen, which are in none of the others, and why.
        nonfinite: of those, the requests whose logits were no numbers.
    """

    request_ids: tuple[RequestId, ...] = ()
    token_ids: tuple[int, ...] = ()
    stopped: tuple[RequestId, ...] = ()
    logprobs: tuple[tuple[RequestId, TokenLogprobs], ...] = ()
    failed: tuple[tuple[Standing, str], ...] = ()
    nonfinite: tuple[RequestId, ...] = ()


def read_tokens(plan: SamplingPlan, words: Int64, *, any_failed: bool) -> StepTokens:
    """Take the device's words apart: `[num_samples]` tokens, then log-probabilities (`ForwardPass.with_logprobs`).

    The device leaves no row without a token unless its logits are no numbers.

    Args:
        any_failed: some request has failed in an earlier step, and may be among these.
    """
    count = len(plan.standing)
    tokens: list[int] = words[:count].tolist()
    logprobs = _read_logprobs(plan, tokens, words[count : plan.num_words]) if plan.num_top is not None else []
    return _step_tokens(plan, tokens, logprobs, {}, None, any_failed)


def from_sampler(plan: SamplingPlan, sampled: SampledTokens, *, any_failed: bool) -> StepTokens:
    """The same of what the `Sampler` chose."""
    why, nonfinite = dict(sampled.failed), frozenset(sampled.nonfinite)
    return _step_tokens(plan, sampled.token_ids, sampled.logprobs, why, nonfinite, any_failed)


def _step_tokens(  # noqa: PLR0917 - what was sampled, one by one
    plan: SamplingPlan,
    tokens: list[int],
    logprobs: list[tuple[RequestId, TokenLogprobs]],
    why: dict[RequestId, str],
    nonfinite: frozenset[RequestId] | None,  # None: every row without a token is
    any_failed: bool,
) -> StepTokens:
    """See who stops, and leave out rows without a token, and those of requests that had none in an earlier step.

    End tokens are excluded until `min_tokens` is reached.
    """
    stopped: tuple[RequestId, ...] = ()
    if plan.any_stop and not plan.any_stop.isdisjoint(tokens):
        stopped = tuple(
            each.request_id
            for each, token_id in zip(plan.standing, tokens, strict=True)
            if token_id in each.sampling.stop_token_ids
        )
    if not any_failed and min(tokens, default=0) >= 0:
        return StepTokens(plan.request_ids, tuple(tokens), stopped, tuple(logprobs))
    gone = {each.request_id for each in plan.standing if each.has_failed}
    failed = [
        (each, why.get(each.request_id, WHY_FAILED))
        for each, token_id in zip(plan.standing, tokens, strict=True)
        if token_id < 0 and not each.has_failed
    ]
    gone.update(each.request_id for each, _ in failed)
    good = [index for index, request_id in enumerate(plan.request_ids) if request_id not in gone]
    return StepTokens(
        request_ids=tuple(plan.request_ids[index] for index in good),
        token_ids=tuple(tokens[index] for index in good),
        stopped=tuple(request_id for request_id in stopped if request_id not in gone),
        logprobs=tuple(entry for entry in logprobs if entry[0] not in gone),
        failed=tuple(failed),
        nonfinite=tuple(each.request_id for each, _ in failed if nonfinite is None or each.request_id in nonfinite),
    )


def _read_logprobs(plan: SamplingPlan, tokens: list[int], words: Int64) -> list[tuple[RequestId, TokenLogprobs]]:
    count, num_top = len(tokens), plan.num_top
    assert num_top is not None
    chosen = _floats(words[:count])
    ranks: list[int] = words[count : 2 * count].tolist()
    tops = words[2 * count :].reshape(2, count, num_top)
    ids: list[list[int]] = tops[0].tolist()
    values = _floats(tops[1])
    entries = []
    for index, asked in plan.asked:
        if tokens[index] >= 0:
            top = tuple(zip(ids[index][:asked], values[index][:asked], strict=True))
            entry = TokenLogprobs(token_id=tokens[index], logprob=chosen[index], rank=ranks[index], top=top)
            entries.append((plan.request_ids[index], entry))
    return entries


def _floats(words: Int64) -> list[Any]:
    """The float32 whose bits are the low halves of int64 words, in lists of the same shape."""
    floats: list[Any] = words.astype(np.int32).view(np.float32).tolist()
    return floats
