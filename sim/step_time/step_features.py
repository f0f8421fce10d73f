"""What a fitted step time is linear in."""

from __future__ import annotations

from collections.abc import Sequence

from .interface import StepShape

FEATURES: tuple[str, ...] = (
    "constant",
    "decodes",
    "prefills",
    "samples",
    "decode_kv",
    "decode_kv_unequal",
    "prefill_pairs",
    "prefill_history_pairs",
    "prefill_history",
)
"""Beside these there is one feature for each stretch of the number of tokens between two knots."""


def features(shape: StepShape, knots: Sequence[int]) -> list[int]:
    """The features' values, `FEATURES` first, then `len(knots) + 1` stretches of tokens.

    A stretch's value is how many of the step's tokens fall in it, so that its coefficient is the slope there: with
    coefficients from 0 up, any piecewise-linear function of the tokens that never falls. That holds a floor of reading
    the weights as well as a kernel that changes its ways.

    Args:
        knots: numbers of tokens, ascending.
    """
    num_decodes = shape.num_decodes
    num_tokens = num_decodes
    pairs = history_pairs = history = 0
    for num_new, num_history in shape.prefills:
        num_tokens += num_new
        pairs += num_new * num_new
        history_pairs += num_new * num_history
        history += num_history
    values = [
        1,
        num_decodes,
        len(shape.prefills),
        shape.num_samples,
        shape.decode_kv_tokens,
        num_decodes * shape.max_decode_kv - shape.decode_kv_tokens,
        pairs,
        history_pairs,
        history,
    ]
    begin = 0
    for knot in knots:
        values.append(min(max(num_tokens - begin, 0), knot - begin))
        begin = knot
    values.append(max(num_tokens - begin, 0))
    return values


def regime(shape: StepShape) -> str:
    """`decode`, `prefill` or `mixed`."""
    if not shape.prefills:
        return "decode"
    return "mixed" if shape.num_decodes else "prefill"
