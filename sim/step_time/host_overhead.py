"""What a step costs beside the device: planning, sampling's bookkeeping, messages, launches."""

from __future__ import annotations

import msgspec

from .interface import StepShape


class HostOverhead(msgspec.Struct, frozen=True):
    """Host time of a step: a constant, some for each row, some more if it holds a chunk of a prompt.

    The default is what octavo's own ring takes on a server's core: about 155 us a step at 256 running (control plane
    alone), and as much again for launching the step.

    Attributes:
        step_ns: of any step.
        row_ns: of each row, whatever it computes.
        prefill_ns: of a step with prefill, which no captured graph launches.
    """

    step_ns: int = 150_000
    row_ns: int = 600
    prefill_ns: int = 0

    def __post_init__(self) -> None:
        for name in ("step_ns", "row_ns", "prefill_ns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def host_ns(self, shape: StepShape) -> int:
        """Between a step's end and the begin of the step that answers it."""
        num_prefills = len(shape.prefills)
        host_ns = self.step_ns + self.row_ns * (shape.num_decodes + num_prefills)
        return host_ns + self.prefill_ns if num_prefills else host_ns
