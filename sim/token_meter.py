"""When tokens came: first tokens, and gaps between tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container

from ..messages.ids import RequestId
from .gaps import GapHistogram


class TokenMeter:
    """Follows the tokens of one replica; costs nothing per row while the rows stay the same.

    Args:
        on_first_token: called once for each request, with the time of its first token.
    """

    def __init__(self, on_first_token: Callable[[RequestId, int], None]) -> None:
        self.gaps = GapHistogram()
        self._on_first_token = on_first_token
        self._has_first: dict[RequestId, None] = {}  # open requests with a token
        self._rows: tuple[RequestId, ...] = ()  # that sampled in the last step
        self._end_ns = 0  # of the last step
        self._last_ns: dict[RequestId, int] = {}  # last token of open requests that were not in the last step

    def take(
        self,
        sampled: tuple[RequestId, ...],
        firsts: tuple[RequestId, ...],
        end_ns: int,
        is_open: Container[RequestId],
    ) -> None:
        """A step is done: these rows have one more token each.

        Args:
            firsts: rows among them that had to compute known tokens before.
            is_open: requests that have not ended.
        """
        if sampled is self._rows or sampled == self._rows:
            if sampled:
                self.gaps.add(end_ns - self._end_ns, len(sampled))
        else:
            self._change_rows(sampled, end_ns, is_open)
        self._end_ns = end_ns
        for request_id in firsts:
            if request_id in is_open and request_id not in self._has_first:
                self._has_first[request_id] = None
                self._on_first_token(request_id, end_ns)

    def take_run(self, sampled: tuple[RequestId, ...], ends_ns: list[int], is_open: Container[RequestId]) -> None:
        """Several steps are done, each with a token for each of these rows."""
        self.take(sampled, (), ends_ns[0], is_open)
        if len(ends_ns) > 1:
            self.gaps.extend([end - begin for begin, end in itertools.pairwise(ends_ns)], len(sampled))
            self._end_ns = ends_ns[-1]

    def interrupt(self) -> None:
        """The steps in flight are lost; rows go on later."""
        for request_id in self._rows:
            self._last_ns[request_id] = self._end_ns
        self._rows = ()

    def forget(self, request_id: RequestId) -> None:
        """A request ended."""
        self._has_first.pop(request_id, None)
        self._last_ns.pop(request_id, None)

    def _change_rows(self, sampled: tuple[RequestId, ...], end_ns: int, is_open: Container[RequestId]) -> None:
        last_ns = self._last_ns
        before_ns = self._end_ns
        for request_id in self._rows:
            if request_id in is_open:
                last_ns[request_id] = before_ns
        num_usual = 0
        for request_id in sampled:
            last = last_ns.pop(request_id, -1)
            if last == before_ns:
                num_usual += 1
            elif last >= 0:
                self.gaps.add(end_ns - last, 1)
        if num_usual:
            self.gaps.add(end_ns - before_ns, num_usual)
        self._rows = sampled
