"""The parameters of a batch of requests, gathered into tensors group by group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...kernels import sampling
from ...messages.ids import RequestId
from .sampling_state import BadWords, Filtering, SamplingState


@dataclass(slots=True)
class Pairs:
    """Pairs (row, token id) to be touched, for rows counted inside a group."""

    rows: torch.Tensor
    token_ids: torch.Tensor


@dataclass(slots=True)
class Processing:
    """What changes the logits of a group's rows, gathered into tensors once per batch."""

    requests: list[SamplingState]
    allowed: Pairs | None
    below_min_tokens: Pairs | None
    bias: Pairs | None
    bias_values: torch.Tensor
    bad_words: list[tuple[int, BadWords]]
    repetition_rows: torch.Tensor
    seen: torch.Tensor | None  # [M, V]; the requests' own `seen` are its rows
    repetition: torch.Tensor
    count_rows: torch.Tensor
    counts: torch.Tensor | None  # [M, V]; likewise
    frequency: torch.Tensor
    presence: torch.Tensor


@dataclass(slots=True)
class Group:
    """Rows of a batch that need the same work; every row is in exactly one group."""

    requests: list[SamplingState]
    rows: torch.Tensor | None  # [M] int64; None: the whole batch
    is_greedy: bool
    filtering: Filtering
    filters: sampling.Filters
    processing: Processing | None


@dataclass(slots=True)
class SamplingBatch:
    """Parameters of a batch as tensors, kept while the same requests come step after step."""

    request_ids: tuple[RequestId, ...]
    requests: list[SamplingState]
    groups: list[Group]
    logprob_rows: list[int]
    drawing: list[SamplingState]  # those that are not greedy


class BatchBuilder:
    """Makes batches on one device.

    Args:
        device: where logits lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def build(self, request_ids: tuple[RequestId, ...], requests: list[SamplingState]) -> SamplingBatch:
        """A batch whose row `i` is `requests[i]`; none of them twice."""
        by_need: dict[tuple[bool, Filtering, bool], list[int]] = {}
        for row, request in enumerate(requests):
            by_need.setdefault((request.is_greedy, request.filtering, request.is_processed), []).append(row)
        groups = [
            self._group([requests[row] for row in rows], rows if len(by_need) > 1 else None, *need)
            for need, rows in by_need.items()
        ]
        return SamplingBatch(
            request_ids=request_ids,
            requests=requests,
            groups=groups,
            logprob_rows=[row for row, request in enumerate(requests) if request.params.logprobs is not None],
            drawing=[request for request in requests if not request.is_greedy],
        )

    def _group(
        self,
        requests: list[SamplingState],
        rows: list[int] | None,
        is_greedy: bool,
        filtering: Filtering,
        is_processed: bool,
    ) -> Group:
        params = [request.params for request in requests]
        return Group(
            requests=requests,
            rows=None if rows is None else self._ints(rows),
            is_greedy=is_greedy,
            filtering=filtering,
            filters=sampling.Filters(
                temperature=self._floats([p.temperature for p in params]),
                top_k=self._ints([p.top_k for p in params]),
                top_p=self._floats([p.top_p for p in params], torch.float64),
                log_min_p=self._floats(
                    [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params], torch.float64
                ),
            ),
            processing=self._processing(requests) if is_processed else None,
        )

    def _processing(self, requests: list[SamplingState]) -> Processing:
        biases = [(row, r.params.logit_bias) for row, r in enumerate(requests) if r.params.logit_bias]
        repeating = [row for row, r in enumerate(requests) if r.seen is not None]
        counting = [row for row, r in enumerate(requests) if r.counts is not None]
        # The matrices become the state itself: each request's vector is a view of its row, so a step updates all of
        # them at once and nothing is kept twice.
        seen = counts = None
        if repeating:
            seen = torch.stack([s for r in requests if (s := r.seen) is not None])
            for row, view in zip(repeating, seen.unbind(), strict=True):
                requests[row].seen = view
        if counting:
            counts = torch.stack([c for r in requests if (c := r.counts) is not None])
            for row, view in zip(counting, counts.unbind(), strict=True):
                requests[row].counts = view
        params = [request.params for request in requests]
        return Processing(
            requests=requests,
            allowed=self._pairs(
                (row, tuple(dict.fromkeys(p.allowed_token_ids)))
                for row, p in enumerate(params)
                if p.allowed_token_ids is not None
            ),
            below_min_tokens=self._pairs(
                (row, sorted(r.stop_token_ids)) for row, r in enumerate(requests) if r.below_min_tokens
            ),
            bias=self._pairs((row, list(bias)) for row, bias in biases),
            bias_values=self._floats([value for _, bias in biases for value in bias.values()]),
            bad_words=[(row, r.bad_words) for row, r in enumerate(requests) if r.bad_words is not None],
            repetition_rows=self._ints(repeating),
            seen=seen,
            repetition=self._floats([params[row].repetition_penalty for row in repeating]).unsqueeze(1),
            count_rows=self._ints(counting),
            counts=counts,
            frequency=self._floats([params[row].frequency_penalty for row in counting]).unsqueeze(1),
            presence=self._floats([params[row].presence_penalty for row in counting]).unsqueeze(1),
        )

    def _pairs(self, rows_and_ids: Iterable[tuple[int, Sequence[int]]]) -> Pairs | None:
        rows: list[int] = []
        token_ids: list[int] = []
        for row, ids in rows_and_ids:
            rows.extend([row] * len(ids))
            token_ids.extend(ids)
        return Pairs(self._ints(rows), self._ints(token_ids)) if rows else None

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
