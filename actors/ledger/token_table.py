"""The output tokens of many requests, to which a step adds one each."""

from __future__ import annotations

from array import array

from ...messages.ids import RequestId
from ...messages.step import StepExecuted


class TokenTable(dict[RequestId, "array[int]"]):
    """Tokens (int32) by request; a step's rows of requests that are not in the table are ignored."""

    def __init__(self) -> None:
        super().__init__()
        self._others = array("i")

    def __missing__(self, request_id: RequestId) -> array[int]:
        return self._others

    def take(self, step: StepExecuted) -> None:
        """Append each row's token: 256 rows cost about 20 us (`python -m octavo.actors.ledger.bench`)."""
        assert len(step.request_ids) == len(step.token_ids)
        # `append` returns None, so `any` calls it for every row without leaving C.
        any(map(array.append, map(self.__getitem__, step.request_ids), step.token_ids))
        if self._others:
            self._others = array("i")
