"""When logits that are no numbers are the executor's fault, and when they are a request's."""

from __future__ import annotations

from collections.abc import Container

from ...messages.ids import RequestId
from ...messages.step import StepExecuted


class NumericsWatch:
    """Tells a request that the model cannot compute from an executor that can compute nothing any more.

    One row among others that came to NaN is that request's matter: it ends, and the others go on. If no row of a step
    came to numbers, weights or device may be damaged: the executor is given up, and the step is done again by another
    one. If no row comes to numbers there either, the requests are the cause, or whatever is damaged is so on disk as
    well: they end, and so do those after them, until some row comes to numbers again.

    A step of a single row says less: only a second one in a row, of another request, makes the executor suspect.
    """

    def __init__(self) -> None:
        self._has_retried = False
        self._is_lone_seen = False

    @property
    def is_alarmed(self) -> bool:
        """Whether the latest tokens were none: only then do good results change anything here."""
        return self._has_retried or self._is_lone_seen

    def hear(self, executed: StepExecuted, live: Container[RequestId]) -> bool:
        """Take note of a step's results; returns whether they are to be dropped, and the executor given up.

        Args:
            live: requests that have not ended; what a step in flight still says of others proves nothing.
        """
        if executed.request_ids:
            self._has_retried = self._is_lone_seen = False
            return False
        num_rows = sum(request_id in live for request_id in executed.nonfinite)
        if not num_rows or self._has_retried or len(executed.failed) > len(executed.nonfinite):
            return False  # or some failed for reasons of their own, so the executor can compute
        if num_rows == 1 and not self._is_lone_seen:
            self._is_lone_seen = True
            return False
        self._has_retried = True
        self._is_lone_seen = False
        return True
