"""What a step-time model is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class StepShape(msgspec.Struct, frozen=True, gc=False):
    """One step's batch, as far as its time depends on it.

    Attributes:
        num_decodes: rows that compute one token behind others that are computed.
        decode_kv_tokens: sum of those rows' context lengths, the token computed in this step included.
        max_decode_kv: the longest of them; 0 without decodes.
        prefills: `(num_new_tokens, num_history_tokens)` of each row that computes a chunk of its prompt; history is
            what lies in the cache already.
        num_samples: rows whose logits are computed and sampled from.
    """

    num_decodes: int
    decode_kv_tokens: int
    max_decode_kv: int
    prefills: tuple[tuple[int, int], ...]
    num_samples: int

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return self.num_decodes + sum(num_new for num_new, _ in self.prefills)

    def after_decodes(self, num_steps: int) -> StepShape:
        """The shape `num_steps` steps later, if every row only decodes on."""
        return StepShape(
            self.num_decodes,
            self.decode_kv_tokens + num_steps * self.num_decodes,
            self.max_decode_kv + num_steps,
            (),
            self.num_samples,
        )


class StepTimeModel(Protocol):
    """Times in integer nanoseconds, a pure function of the shape: asked twice, it answers the same."""

    def step_ns(self, shape: StepShape) -> int:
        """How long the device is busy with this step, at least 1."""
        ...

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> Sequence[int]:
        """`[step_ns(shape.after_decodes(i)) for i in range(num_steps)]`, bit for bit, but fast.

        Args:
            shape: decodes alone.
        """
        ...

    def host_ns(self, shape: StepShape) -> int:
        """Time between a step's end and the moment the executor may begin the step planned in answer to it.

        With several steps in flight it is hidden behind the next step, unless it is longer than that. It may depend on
        the number of rows and tokens, not on context lengths, so that it is the same along a run of decode steps.
        """
        ...

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        """Of `shape` and the steps that follow as its rows decode on, how many lie outside what was measured."""
        ...

    def describe(self) -> dict[str, str | int | float]:
        """What the model is and rests on, for reports."""
        ...
