"""Tokens that the last stage of a pipeline has sampled, or will, and that this stage has not heard of yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ...messages.ids import RequestId

_FAILED = -1


class PendingTokens:
    """What an earlier stage waits for, step by step, in the order of the steps.

    A step of requests that wait for nothing can be computed at once: so stages work on different steps at a time.

    Args:
        receive: blocks until the next step's tokens come; takes how many.
        append: given requests and a token for each.
    """

    def __init__(
        self, receive: Callable[[int], list[int]], append: Callable[[Sequence[RequestId], Sequence[int]], None]
    ) -> None:
        self._receive = receive
        self._append = append
        # For each step its requests in order, and whether they still want their token.
        self._steps: deque[dict[RequestId, bool]] = deque()

    def expect(self, request_ids: Iterable[RequestId]) -> None:
        """A step has gone on to the next stage, and these requests of it will be sampled."""
        wanted = dict.fromkeys(request_ids, True)
        if wanted:
            self._steps.append(wanted)

    def forget(self, request_id: RequestId) -> None:
        """A request was dropped: what is still to come for it is of no use, also should it start anew."""
        for wanted in self._steps:
            if request_id in wanted:
                wanted[request_id] = False

    def settle(self, request_ids: Iterable[RequestId]) -> None:
        """Wait until none of these requests lacks a token."""
        last = -1
        for request_id in request_ids:
            for index in range(len(self._steps) - 1, last, -1):
                if self._steps[index].get(request_id, False):
                    last = index
                    break
        for _ in range(last + 1):
            self._take()

    def drain(self) -> None:
        """Wait for all that is still to come, and let it go."""
        while self._steps:
            self._receive(len(self._steps.popleft()))

    def _take(self) -> None:
        wanted = self._steps.popleft()
        token_ids = self._receive(len(wanted))
        known = [
            (request_id, token_id)
            for (request_id, is_wanted), token_id in zip(wanted.items(), token_ids, strict=True)
            if is_wanted and token_id != _FAILED
        ]
        if known:
            self._append([request_id for request_id, _ in known], [token_id for _, token_id in known])
