"""What a percentile is, of all that is measured or simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence

_ROUNDING = 1e-9
"""A share such as 0.07 is not exact in binary: seven of a hundred are no part of the eighth."""


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` of them do not exceed; NaN of none. In any order.

    Raises:
        ValueError: `share` is not between 0 and 1; of percents it is the hundredth part.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}: the 99th percentile is 0.99")
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values) - _ROUNDING) - 1)]
