"""In a `ForwardPass`'s place, for measurements of the host: counts what would be launched, and computes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .forward_pass import ForwardPass
from .mixed_sizes import MixedSize
from .packed_step import PackedStep

_AROUND_LAYERS = 3  # inputs gathered, tokens embedded, the last norm
_SAMPLING = 5  # samples chosen, logits, their edits, tokens chosen, tokens appended
_WAY_BACK = 2  # a copy, an event


@dataclass(slots=True)
class Launches:
    """What steps launch, and what of them a device's time depends on.

    Attributes:
        num_layers: of the model.
        per_layer: kernels of one; 14 of a dense Qwen3 layer.
        count: launches so far; a replayed graph is one.
        chunk_tokens: tokens of prompts so far, padding included.
    """

    num_layers: int = 28
    per_layer: int = 14
    count: int = 0
    chunk_tokens: int = 0


class CountedForward(ForwardPass):
    """Every method of a `ForwardPass` that launches.

    Args:
        launches: is counted up.
        section: samples of one step, at most.
    """

    def __init__(self, launches: Launches, section: int) -> None:
        self._launches = launches
        self._nothing = torch.zeros((section, 0))
        self._tokens_sampled = torch.zeros(section, dtype=torch.int64)

    def load(self, words: torch.Tensor, step: PackedStep, *, has_size: bool) -> None:
        self._launches.count += 1 + (step.num_pieces > 0 and not has_size)

    def decode(self, num_rows: int) -> None:
        self._launches.count += 1

    def mixed(self, size: MixedSize) -> None:
        self._launches.count += 1
        self._launches.chunk_tokens += size.num_chunk_tokens

    def compute(self, step: PackedStep) -> torch.Tensor:
        launches = self._launches
        launches.count += _AROUND_LAYERS + launches.num_layers * launches.per_layer
        launches.chunk_tokens += step.num_tokens - step.num_decodes
        return self._nothing

    def sampling_logits(self, step: PackedStep, hidden: torch.Tensor) -> torch.Tensor:
        return self._nothing[: len(step.sampled)]

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        self._launches.count += _SAMPLING
        return self._tokens_sampled[: len(logits)]

    def sampled(self, count: int) -> torch.Tensor:
        self._launches.count += _WAY_BACK
        return self._tokens_sampled[:count]
