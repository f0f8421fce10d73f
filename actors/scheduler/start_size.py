"""How long a step's message may get by the requests that it starts, each with its whole prompt."""

from __future__ import annotations

from typing import Final

from ...messages.sampling import SamplingParams
from .sequence import Sequence

MAX_START_BYTES: Final = 8 << 20
"""Of the requests that one step starts, unless it is one alone. Half of what a link takes in a message: the rest is for
block tables, and for the rows of the standing batch."""

_ID_BYTES: Final = 5
_BIAS_BYTES: Final = 14
_CHARACTER_BYTES: Final = 4


def start_bytes(sequence: Sequence) -> int:
    """An upper bound of what a request's start adds to a step's message, but for a few hundred bytes."""
    return 4 * len(sequence.tokens) + params_bytes(sequence.submit.params)


def params_bytes(params: SamplingParams) -> int:
    """The same of its parameters: of those that may be long."""
    num_bytes = _ID_BYTES * (len(params.stop_token_ids) + len(params.allowed_token_ids or ()))
    num_bytes += _BIAS_BYTES * len(params.logit_bias or ())
    for words in (params.stop, params.bad_words):
        for word in words:
            num_bytes += _ID_BYTES + _CHARACTER_BYTES * len(word)
    for word_ids in params.bad_words_token_ids:
        num_bytes += _ID_BYTES * (1 + len(word_ids))
    return num_bytes
