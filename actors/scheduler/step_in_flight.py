"""A step that was sent and whose results are awaited."""

from __future__ import annotations

from array import array

from ...messages.ids import RequestId, StepId
from .sequence import Sequence


class StepInFlight:
    """What a step was planned to do, so that its results need no look-up.

    Attributes:
        sampling_ids: requests whose row samples, in the order of the rows.
        sampling: the same requests.
        token_arrays: their tokens, to be appended to.
        computing: requests whose row only computes.
        finishing: requests whose last possible token this step samples.
    """

    __slots__ = ("computing", "finishing", "sampling", "sampling_ids", "step_id", "token_arrays")

    def __init__(
        self,
        step_id: StepId,
        sampling: list[Sequence],
        sampling_ids: tuple[RequestId, ...],
        token_arrays: list[array[int]],
    ) -> None:
        self.step_id = step_id
        self.sampling = sampling
        self.sampling_ids = sampling_ids
        self.token_arrays = token_arrays
        self.computing: list[Sequence] = []
        self.finishing: list[Sequence] = []
