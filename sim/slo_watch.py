"""When a run can no longer meet its service level."""

from __future__ import annotations

import math

from .slo import Slo


class SloWatch:
    """Ends a run that can no longer meet its service level.

    With N requests and a limit on the p-th percentile (nearest rank), more than N - ceil(N x p) requests beyond it
    decide the run: those that the percentile leaves out can only make the allowance smaller. There is no early pass.
    """

    def __init__(self, slo: Slo, num_requests: int) -> None:
        self._limits = [
            (term.metric, round(term.limit_s * 1e9), num_requests - math.ceil(num_requests * term.percentile / 100))
            for term in slo.terms
            if term.percentile > 0 and term.metric in ("ttft", "e2e", "tpot")
        ]
        self._num_missed = [0] * len(self._limits)
        self.is_lost = False

    def see(self, metric: str, value_ns: int) -> None:
        """A request has this figure."""
        for i, (name, limit_ns, num_allowed) in enumerate(self._limits):
            if name == metric and value_ns > limit_ns:
                self._num_missed[i] += 1
                self.is_lost = self.is_lost or self._num_missed[i] > num_allowed
