"""What the device changes in a request's logits, as far as there is room for it in the request's row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....kernels.step_layout import MAX_EDITS
from ....messages.sampling import SamplingParams
from ....messages.step import StartRequest


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """See `octavo.kernels.logit_processing`; the defaults change nothing.

    Attributes:
        biased: what is added to the logits of token ids, -inf for those that are excluded.
        min_tokens: below so many output tokens `stops` are excluded too.
    """

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    biased: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stops: tuple[int, ...] = ()


NO_EDITS = LogitEdits()


def asks_for_edits(params: SamplingParams) -> bool:
    """Whether parameters say anything of logits that the device could apply, be it nothing; most say nothing."""
    return (
        params.min_tokens > 0
        or params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.logit_bias is not None
        or bool(params.bad_words_token_ids)
    )


def edits_of(start: StartRequest, vocab_size: int) -> LogitEdits | None:
    """What the device does for a request; None if that does not fit, and all of it is the `Sampler`'s to do.

    Left to the `Sampler` in any case are `allowed_token_ids` and bad words of several tokens.
    """
    params = start.params
    biased = dict(params.logit_bias or ())
    biased.update((sequence[0], -math.inf) for sequence in params.bad_words_token_ids if len(sequence) == 1)
    stops: tuple[int, ...] = ()
    if params.min_tokens > 0:
        stops = tuple(dict.fromkeys((*start.eos_token_ids, *params.stop_token_ids)))
    num_edits = len(biased) + len(stops)
    # Where all tokens could be excluded, somebody has to look at the logits to say whether they were numbers.
    if num_edits > MAX_EDITS or num_edits >= vocab_size:
        return None
    edits = LogitEdits(
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        biased=biased,
        min_tokens=min(params.min_tokens, 2**31 - 1) if stops else 0,
        stops=stops,
    )
    return NO_EDITS if edits == NO_EDITS else edits
