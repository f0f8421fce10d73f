"""What sampling keeps of one request: its parameters, its place in its stream of chance, its penalties' tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import torch

from ...kernels import philox
from ...messages.sampling import SamplingParams

_NUM_DRAWS_AHEAD = 16  # uniforms made per request at once: the generator costs about 0.1 ms however few are asked for


Filtering = Literal["none", "narrow", "wide"]
"""How top-k, top-p and min-p are applied: not at all, to a few likely tokens, or to the whole vocabulary."""


class BadWords:
    """The token sequences that a request may not complete."""

    def __init__(self, sequences: Iterable[tuple[int, ...]], token_ids: list[int]) -> None:
        sequences = [sequence for sequence in sequences if sequence]
        self._single = sorted({sequence[0] for sequence in sequences if len(sequence) == 1})
        # Keyed by the token before the last, so that a step looks only at sequences that may be about to end.
        self._by_previous: dict[int, list[tuple[list[int], int]]] = {}
        for sequence in sequences:
            if len(sequence) > 1:
                self._by_previous.setdefault(sequence[-2], []).append((list(sequence[:-1]), sequence[-1]))
        self._max_prefix = max((len(sequence) - 1 for sequence in sequences), default=0)
        self._tail = token_ids[max(0, len(token_ids) - self._max_prefix) :]

    def append(self, token_id: int) -> None:
        self._tail.append(token_id)
        if len(self._tail) > self._max_prefix:
            del self._tail[0]

    def forbidden(self) -> list[int]:
        """Tokens that would complete a sequence now."""
        forbidden = list(self._single)
        for prefix, last in self._by_previous.get(self._tail[-1], ()) if self._tail else ():
            if self._tail[-len(prefix) :] == prefix:
                forbidden.append(last)
        return forbidden


@dataclass(slots=True, eq=False)
class SamplingState:
    """Sampling state of one request; its owner is the `Sampler`."""

    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    stop_token_ids: frozenset[int]
    num_output_tokens: int
    is_greedy: bool
    filtering: Filtering
    seed: int  # the unsigned 64 bits, reinterpreted as signed
    bad_words: BadWords | None = None
    seen: torch.Tensor | None = None  # [V] bool, tokens of prompt and output; for the repetition penalty
    counts: torch.Tensor | None = None  # [V] float32, occurrences in the output; for the other two
    draws: list[float] = field(default_factory=list)
    first_draw: int = 0  # position of draws[0]

    @property
    def below_min_tokens(self) -> bool:
        return self.num_output_tokens < self.params.min_tokens

    @property
    def is_processed(self) -> bool:
        """Whether the logits must be changed before a token is chosen."""
        params = self.params
        return (
            self.bad_words is not None
            or self.seen is not None
            or self.counts is not None
            or params.logit_bias is not None
            or params.allowed_token_ids is not None
            or self.below_min_tokens
        )


def left_to_do(params: SamplingParams) -> SamplingParams:
    """The parameters without what is applied where the logits are: bias, penalties, `min_tokens`, single bad words."""
    return msgspec.structs.replace(
        params,
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        logit_bias=None,
        min_tokens=0,
        bad_words_token_ids=tuple(sequence for sequence in params.bad_words_token_ids if len(sequence) > 1),
    )


def draw_ahead(requests: list[SamplingState]) -> None:
    """See that each request has its uniform number for this position."""
    due = [r for r in requests if not 0 <= r.num_output_tokens - r.first_draw < len(r.draws)]
    if not due:
        return
    # Made on the CPU: a few hundred integers, wanted as Python numbers.
    seeds = torch.tensor([r.seed for r in due], dtype=torch.int64)
    starts = torch.tensor([r.num_output_tokens for r in due], dtype=torch.int64)
    positions = starts.unsqueeze(1) + torch.arange(_NUM_DRAWS_AHEAD)
    draws = philox.uniform(seeds.unsqueeze(1).expand_as(positions), positions).tolist()
    for request, ahead in zip(due, draws, strict=True):
        request.draws = ahead
        request.first_draw = request.num_output_tokens
