"""A step between its launch and its result, and the host's memory that the device reads and writes meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ....kernels.step_layout import StepLayout
from ....messages.ids import RequestId
from ....messages.request import TokenLogprobs
from ....messages.step import ExecuteStep, StepExecuted
from ..sampler import SampledTokens
from .forward_pass import PACKED_WORDS
from .packed_step import Int64, PackedStep
from .sampling_plan import MAX_TOP_LOGPROBS, SamplingPlan, StepTokens, from_sampler, read_tokens
from .step_diff import Int32
from .stream import DONE, Completion


@dataclass(slots=True, eq=False)
class Staging:
    """What one step in flight needs of the host's memory; on a GPU pinned, so that copies wait for nothing.

    Attributes:
        words: the packed step; the first as a tensor, the second as the same memory in numpy, as below.
        results: int64, what comes back.
    """

    words: torch.Tensor
    words_array: Int32
    results: torch.Tensor
    results_array: Int64

    @classmethod
    def empty(cls, layout: StepLayout, *, pin: bool) -> Staging:
        words = torch.zeros(layout.diff + PACKED_WORDS, dtype=torch.int32, pin_memory=pin)
        results = torch.zeros(layout.section * (3 + 2 * MAX_TOP_LOGPROBS), dtype=torch.int64, pin_memory=pin)
        return cls(words, words.numpy(), results, results.numpy())


class Launched:
    """One step that was launched.

    Args:
        staging: given back when the device is done with it.
        words: the packed step, in `staging` if it fits.
    """

    __slots__ = (
        "_values",
        "_words",
        "any_failed",
        "completion",
        "launched_ns",
        "packed",
        "plan",
        "prompt_logprobs",
        "sampled",
        "staging",
        "step",
    )

    def __init__(
        self,
        step: ExecuteStep,
        packed: PackedStep,
        plan: SamplingPlan,
        *,
        staging: Staging,
        words: torch.Tensor,
        launched_ns: int,
    ) -> None:
        self.step, self.packed, self.plan, self.launched_ns = step, packed, plan, launched_ns
        self.staging: Staging | None = staging
        self.completion: Completion = DONE
        self.prompt_logprobs: tuple[tuple[RequestId, int, tuple[TokenLogprobs, ...]], ...] = ()
        self.sampled: SampledTokens | None = None  # where the sampler chose them, at launch
        self.any_failed = False  # since the launch, of the requests that were there then
        self._words: torch.Tensor | None = words
        self._values: Int64 = np.zeros(0, dtype=np.int64)

    @property
    def words(self) -> torch.Tensor:
        assert self._words is not None, "the step is over"
        return self._words

    @property
    def results(self) -> torch.Tensor:
        """Where the device puts what it sampled."""
        assert self.staging is not None, "the step is over"
        return self.staging.results

    def is_done(self) -> bool:
        return self.staging is None or self.completion.is_done()

    def settle(self) -> Staging | None:
        """Wait for the device and give the memory back; None if that was done before."""
        staging = self.staging
        if staging is None:
            return None
        self.completion.wait()
        if self.sampled is None:
            self._values = staging.results_array[: self.plan.num_words].copy()
        self.staging = self._words = None
        return staging

    def read(self) -> StepTokens:
        """What was sampled, once settled; requests that have failed by now are left out."""
        if self.sampled is not None:
            return from_sampler(self.plan, self.sampled, any_failed=self.any_failed)
        return read_tokens(self.plan, self._values, any_failed=self.any_failed)

    def executed(self, tokens: StepTokens, execute_ns: int) -> StepExecuted:
        """The answer to the step."""
        return StepExecuted(
            self.step.epoch,
            self.step.step_id,
            tokens.request_ids,
            tokens.token_ids,
            stopped=tokens.stopped,
            logprobs=tokens.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            failed=tuple((standing.request_id, why) for standing, why in tokens.failed),
            execute_ns=execute_ns,
            nonfinite=tokens.nonfinite,
        )
