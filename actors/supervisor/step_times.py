"""How long a step may take before it counts as hung."""

from __future__ import annotations

from collections import deque

_NUM_RECENT = 128
_NUM_ENOUGH = 8
_NUM_YOUNG_STEPS = 16
_FACTOR = 10
_MARGIN_NS = 1_000_000_000


class StepTimes:
    """Durations of recent steps, by the size of their batch, and the limit that follows from them.

    The limit is 10 times the 99th percentile of recent steps of a like number of tokens (within a power of two), plus 1
    s: at most 3 s where steps take up to 0.2 s, and never below what slow but regular steps need. Only the longest step
    between two beats is known, so the percentile errs on the long side. A size of which little is known is estimated
    from the
    others, as if time grew with the number of tokens but never shrank with it: steps of few tokens are bound by the
    weights' bandwidth, so that errs on the long side, too. An executor's first steps compile and allocate: their limit
    also looks at the first steps of the incarnations before.

    Args:
        first_step_ns: the limit while nothing at all is known.
    """

    def __init__(self, first_step_ns: int) -> None:
        self._first_step_ns = first_step_ns
        self._recent: dict[int, deque[int]] = {}  # by the bit length of the number of tokens
        self._young: deque[int] = deque(maxlen=_NUM_YOUNG_STEPS)

    def observe(self, num_tokens: int, duration_ns: int, progress: int) -> None:
        """Take note of a step that ended, of an executor that has executed `progress` steps."""
        self._recent.setdefault(num_tokens.bit_length(), deque(maxlen=_NUM_RECENT)).append(duration_ns)
        if progress <= _NUM_YOUNG_STEPS:
            self._young.append(duration_ns)

    def limit_ns(self, num_tokens: int, progress: int) -> int:
        """How long a step of `num_tokens` may take, if the executor has executed `progress` steps before."""
        if not self._recent:
            return self._first_step_ns
        size = num_tokens.bit_length()
        own = self._recent.get(size, ())
        usual_ns = _percentile_99(own)
        if len(own) < _NUM_ENOUGH:
            for other, durations in self._recent.items():
                usual_ns = max(usual_ns, _percentile_99(durations) << max(0, size - other))
        if progress < _NUM_YOUNG_STEPS:
            usual_ns = max(usual_ns, *self._young, 0)
        return _FACTOR * usual_ns + _MARGIN_NS


def _percentile_99(durations: deque[int] | tuple[int, ...]) -> int:
    if not durations:
        return 0
    return sorted(durations)[-(-99 * len(durations) // 100) - 1]
