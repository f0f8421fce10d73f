"""What a server's step takes beyond its operators, as part of the step."""

from __future__ import annotations

from collections.abc import Sequence

from .host_overhead import HostOverhead
from .interface import StepShape, StepTimeModel


class WithExposedOverhead:
    """A model whose every step takes longer by an overhead that nothing hides.

    Operators that were measured one by one, warm and alone, do not add up to a step: there are gaps between them, the
    batch's arrays are copied, clocks fall under a lasting load. With several steps in flight `host_ns` is hidden behind
    the next step; this is not.

    Args:
        model: the operators' sum.
        overhead: what is added to each step.
    """

    def __init__(self, model: StepTimeModel, overhead: HostOverhead) -> None:
        self.model = model
        self.overhead = overhead

    def step_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        return self.model.step_ns(shape) + self.overhead.host_ns(shape)

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> Sequence[int]:
        """See `StepTimeModel`."""
        extra = self.overhead.host_ns(shape)
        return [duration + extra for duration in self.model.decode_run_ns(shape, num_steps)]

    def host_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        return self.model.host_ns(shape)

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        """See `StepTimeModel`."""
        return self.model.num_extrapolated(shape, num_steps)

    def describe(self) -> dict[str, str | int | float]:
        """See `StepTimeModel`."""
        overhead = self.overhead
        return {
            **self.model.describe(),
            "exposed_step_ns": overhead.step_ns,
            "exposed_row_ns": overhead.row_ns,
            "exposed_prefill_ns": overhead.prefill_ns,
        }
