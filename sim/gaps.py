"""Percentiles of millions of gaps between tokens, in little memory."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np

_RATIO = 1.001  # two values of one bin differ by at most this factor
_NUM_BINS = math.ceil(math.log(1e15) / math.log(_RATIO))
_FLUSH_AT = 1 << 15


class GapHistogram:
    """Counts of gaps in ns, in bins a thousandth wide; sum and maximum are exact."""

    def __init__(self) -> None:
        self._gaps = array("q")
        self._weights = array("q")
        self._bins = np.zeros(0, dtype=np.int64)  # made when first needed: a thousand replicas have one each
        self.count = 0
        self.total_ns = 0
        self.max_ns = 0

    def add(self, gap_ns: int, weight: int) -> None:
        """Count a gap `weight` times."""
        self._gaps.append(gap_ns)
        self._weights.append(weight)
        if len(self._gaps) >= _FLUSH_AT:
            self._flush()

    def extend(self, gaps_ns: Sequence[int], weight: int) -> None:
        """Count each of these gaps `weight` times."""
        self._gaps.extend(gaps_ns)
        self._weights.extend([weight] * len(gaps_ns))
        if len(self._gaps) >= _FLUSH_AT:
            self._flush()

    def merge(self, other: GapHistogram) -> None:
        """Count what another histogram has counted."""
        self._flush()
        other._flush()
        if not len(self._bins):
            self._bins = np.zeros(_NUM_BINS, dtype=np.int64)
        if len(other._bins):
            self._bins += other._bins
        self.count += other.count
        self.total_ns += other.total_ns
        self.max_ns = max(self.max_ns, other.max_ns)

    def percentile_ns(self, percent: float) -> float:
        """Nearest rank, to a thousandth; NaN if nothing was counted."""
        self._flush()
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(self.count * percent / 100))
        position = int(np.searchsorted(np.cumsum(self._bins), rank))
        return float(min(self.max_ns, _RATIO ** (position + 0.5)))

    def mean_ns(self) -> float:
        """NaN if nothing was counted."""
        self._flush()
        return self.total_ns / self.count if self.count else math.nan

    def _flush(self) -> None:
        if not self._gaps:
            return
        gaps = np.array(self._gaps, dtype=np.int64)
        weights = np.array(self._weights, dtype=np.int64)
        del self._gaps[:], self._weights[:]
        if not len(self._bins):
            self._bins = np.zeros(_NUM_BINS, dtype=np.int64)
        positions = (np.log(np.maximum(gaps, 1)) / math.log(_RATIO)).astype(np.int64)
        np.add.at(self._bins, np.minimum(positions, _NUM_BINS - 1), weights)
        self.count += int(weights.sum())
        self.total_ns += int((gaps * weights).sum())
        self.max_ns = max(self.max_ns, int(gaps.max()))
