"""What is known of a request that stands on the device, and of a step that is packed for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....messages.ids import RequestId
from ..sampling_state import SamplingState
from .mixed_sizes import MixedSize

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Standing:
    """One request, from its start to its drop.

    Attributes:
        row: on the device.
        sampling: its state in the `Sampler`.
        is_plain: the device can sample it from now on, and nothing but a token is asked for.
        num_tokens: that it has, sampled ones of steps in flight included.
        num_computed: of them, computed by steps that were packed; of a row that decodes both are out of date, as the
            `DecodeSheet` counts on.
        num_blocks: in its block table.
        has_failed: no token could be sampled for it, so there is nothing to go on with.
        is_edited: the device changes its logits before a token is chosen.
    """

    request_id: RequestId
    row: int
    num_prompt_tokens: int
    sampling: SamplingState
    is_plain: bool
    num_tokens: int
    num_computed: int
    num_blocks: int
    has_failed: bool = False
    is_edited: bool = False

    @property
    def will_sample(self) -> bool:
        """Whether computing one more token leads to the next one."""
        return self.num_computed + 1 == self.num_tokens and not self.has_failed

    def enter(self, context_len: int) -> None:
        """Note that so many tokens are computed, and that the last of them gave one more."""
        self.num_computed, self.num_tokens = context_len, context_len + 1


@dataclass(slots=True)
class PackedStep:
    """What a packed step holds, for whoever launches it.

    Attributes:
        num_words: of the packed step.
        num_pieces: of its diff.
        max_query_len, max_context_len, num_decodes: as in `AttentionBatch`.
        sampled: the requests that sample, in the order of the step's rows.
        is_decode: every row computes one token and samples, so that row i is sample i.
        padded_to: the size that rows and tokens are laid out for; None: they lie one behind the other, without padding
            among them.
    """

    num_words: int
    num_pieces: int
    num_rows: int
    num_tokens: int
    max_query_len: int
    max_context_len: int
    num_decodes: int
    sampled: Sequence[Standing]
    is_decode: bool
    padded_to: MixedSize | None = None
