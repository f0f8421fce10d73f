"""Requests that went from one engine to another while the first may still speak of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress

import msgspec

from ...messages.ids import RequestId
from ...messages.processes import EngineReport
from ...messages.request import RequestEnded
from ...messages.step import StepExecuted

_LIVE = -1
_ENDED = -2


class MovedRequests:
    """What an engine still says of requests that another one has now, and would be heard twice.

    It was told to cancel each. Its answer, the request's end, is not its last word: a step that was planned before may
    still bring a token. So a request is forgotten only once the steps planned up to its end are done, as the engine's
    reports tell.
    """

    def __init__(self) -> None:
        self._fences: dict[RequestId, int] = {}  # steps that have to be done; or `_LIVE`, `_ENDED`

    def __len__(self) -> int:
        return len(self._fences)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._fences

    def add(self, request_ids: Iterable[RequestId]) -> None:
        """These have another engine now, and this one is told to cancel them."""
        self._fences.update(dict.fromkeys(request_ids, _LIVE))

    def clear(self) -> None:
        """The engine knows of none of them any more, nor is anything of it under way."""
        self._fences.clear()

    def take_end(self, ended: RequestEnded) -> bool:
        """Whether an end is that of one of them."""
        is_moved = ended.request_id in self._fences
        if is_moved:
            self._fences[ended.request_id] = _ENDED
        return is_moved

    def take_report(self, report: EngineReport) -> None:
        """Forget those of which nothing can come any more."""
        num_done = report.num_steps - report.num_steps_in_flight
        for request_id, fence in list(self._fences.items()):
            due = report.num_steps if fence == _ENDED else fence
            self._fences[request_id] = due
            if 0 <= due <= num_done:
                del self._fences[request_id]

    def without(self, step: StepExecuted) -> StepExecuted:
        """A step's results but for theirs; the very same object if there are none."""
        moved = self._fences
        is_kept = [request_id not in moved for request_id in step.request_ids]
        kept = msgspec.structs.replace(
            step,
            request_ids=tuple(compress(step.request_ids, is_kept)),
            token_ids=tuple(compress(step.token_ids, is_kept)),
            stopped=tuple(request_id for request_id in step.stopped if request_id not in moved),
            logprobs=tuple(remark for remark in step.logprobs if remark[0] not in moved),
            prompt_logprobs=tuple(remark for remark in step.prompt_logprobs if remark[0] not in moved),
            failed=tuple(remark for remark in step.failed if remark[0] not in moved),
            nonfinite=tuple(request_id for request_id in step.nonfinite if request_id not in moved),
        )
        return step if kept == step else kept
