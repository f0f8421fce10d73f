"""Smallest or largest whole number that passes a test, in few tests."""

from __future__ import annotations

from collections.abc import Callable

NUM_NEIGHBOURS = 3
_SCANNED = 8  # an answer up to this is confirmed by trying every smaller one


def smallest(
    passes: Callable[[int], bool],
    *,
    at_least: int,
    at_most: int,
    start: int | None = None,
    first_step: int = 1,
    num_neighbours: int = NUM_NEIGHBOURS,
) -> int | None:
    """The smallest number that passes, as a scan from `at_least` upwards would find it.

    Brackets it from `start` in steps that double, then halves the bracket. More replicas may do worse (they share
    fewer prefixes), so the numbers below the answer are tried too: all of them if they are few, otherwise
    `num_neighbours`.

    Args:
        passes: asked at most once for each number.
        start: where the answer is thought to be; a wrong thought costs tests and changes no answer.
        first_step: of the bracket.

    Returns:
        None if none of the numbers tried passes, `at_most` among them.
    """
    known: dict[int, bool] = {}

    def ask(number: int) -> bool:
        if number not in known:
            known[number] = passes(number)
        return known[number]

    first = min(max(start if start is not None else at_least, at_least), at_most)
    low, high = _bracket(ask, first, at_least, at_most, first_step)
    if high is None:
        return None
    while True:
        while high - low > 1:
            middle = (low + high) // 2
            if ask(middle):
                high = middle
            else:
                low = middle
        furthest = at_least if high - at_least <= _SCANNED else high - num_neighbours
        better = next((number for number in range(furthest, high) if ask(number)), None)
        if better is None:
            return high
        low, high = at_least - 1, better
        # what lies below `furthest` is unknown; begin again under the better one
        while low < high - 1 and known.get(low + 1) is False:
            low += 1


def largest(
    passes: Callable[[int], bool],
    *,
    at_least: int,
    at_most: int,
    start: int | None = None,
    first_step: int = 1,
    num_neighbours: int = NUM_NEIGHBOURS,
) -> int | None:
    """The largest number that passes before the first that fails, found as `smallest` finds its own.

    Read backwards: the smallest number that fails, less one. None if `at_least` fails already; `at_most` if none fails.
    """
    first_failing = smallest(
        lambda number: not passes(number),
        at_least=at_least,
        at_most=at_most,
        start=None if start is None else start + 1,
        first_step=first_step,
        num_neighbours=num_neighbours,
    )
    if first_failing is None:
        return at_most
    return first_failing - 1 if first_failing > at_least else None


def _bracket(ask: Callable[[int], bool], first: int, at_least: int, at_most: int, step: int) -> tuple[int, int | None]:
    """`(fails or at_least - 1, passes or None)` around the answer, found in steps that double away from `first`."""
    if ask(first):
        high = first
        while high > at_least:
            low = max(at_least, high - step)
            if not ask(low):
                return low, high
            high, step = low, step * 2
        return at_least - 1, high
    low = first
    while low < at_most:
        high = min(at_most, low + step)
        if ask(high):
            return low, high
        low, step = high, step * 2
    return low, None
