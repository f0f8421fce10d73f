"""The sampling state of the executor's requests, and its application to a batch.

The order is vLLM's: log-probabilities are taken from the raw logits; then allowed token ids, bad words, `min_tokens`,
logit bias, penalties (repetition, frequency, presence), and for rows that are not greedy temperature, min-p, top-k,
top-p and the draw.

A row's token is a function of its logits, its parameters, its tokens so far, and the uniform number keyed by
(seed, number of output tokens so far): not of its place in the batch, of other rows, or of having been preempted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...kernels import sampling
from ...messages.ids import RequestId
from ...messages.request import TokenLogprobs
from ...messages.sampling import SamplingParams
from .out_of_memory import is_out_of_memory
from .sampling_batch import BatchBuilder, SamplingBatch
from .sampling_state import BadWords, Filtering, SamplingState, draw_ahead, left_to_do
from .token_choice import choose, count, why_failed, why_no_numbers
from .token_logprobs import token_logprobs


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What one step sampled.

    Attributes:
        token_ids: one for each row, in order; -1 for a failed row.
        stopped: rows whose token is an end or stop token, with `min_tokens` reached.
        logprobs: for the rows that asked.
        failed: `(request_id, message)` for rows from which no token could be chosen; their state has not changed.
        nonfinite: those of them whose logits are no numbers.
    """

    token_ids: list[int]
    stopped: list[RequestId]
    logprobs: list[tuple[RequestId, TokenLogprobs]]
    failed: list[tuple[RequestId, str]]
    nonfinite: list[RequestId] = field(default_factory=list)

    def extend(self, other: SampledTokens) -> None:
        """Append other rows of the same step."""
        self.token_ids.extend(other.token_ids)
        self.stopped.extend(other.stopped)
        self.logprobs.extend(other.logprobs)
        self.failed.extend(other.failed)
        self.nonfinite.extend(other.nonfinite)


class Sampler:
    """Owner of every request's sampling state on one device.

    Args:
        vocab_size: columns of the logits.
        device: where logits lie.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._builder = BatchBuilder(self._device)
        self._requests: dict[RequestId, SamplingState] = {}
        self._unusable: dict[RequestId, str] = {}  # that could not be added, and why
        self._batch: SamplingBatch | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def add(
        self,
        request_id: RequestId,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        eos_token_ids: tuple[int, ...],
        *,
        is_edited: bool = False,
    ) -> None:
        """Take a request on, new or again after preemption.

        Args:
            request_id: not yet known here.
            params: with `seed` filled in, unless greedy.
            token_ids: prompt, then outputs so far.
            num_prompt_tokens: how many of them are the prompt's.
            eos_token_ids: the model's end tokens; empty under `ignore_eos`.
            is_edited: its logits come with bias, penalties, `min_tokens` and bad words of one token applied.

        Raises:
            ValueError: a token id lies outside the vocabulary, or a value makes no sense; the sampler is unchanged.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id} is already being sampled: remove it first")
        if not 0 <= num_prompt_tokens <= len(token_ids):
            raise ValueError(f"num_prompt_tokens={num_prompt_tokens} does not fit {len(token_ids)} tokens")
        if params.allowed_token_ids is not None and not params.allowed_token_ids:
            raise ValueError(f"allowed_token_ids of request {request_id} is empty: name a token, or leave it out")
        self._check_ids(params, eos_token_ids)
        if is_edited:
            params = left_to_do(params)
        is_greedy = params.temperature < sampling.GREEDY_EPS
        if params.seed is None and not is_greedy:
            raise ValueError(f"request {request_id} draws at random without a seed: fill in params.seed")
        seed = (params.seed or 0) % 2**64
        request = SamplingState(
            params=params,
            eos_token_ids=eos_token_ids,
            stop_token_ids=frozenset((*eos_token_ids, *params.stop_token_ids)),
            num_output_tokens=len(token_ids) - num_prompt_tokens,
            is_greedy=is_greedy,
            filtering=self._filtering(params, is_greedy),
            seed=seed - 2**64 if seed >= 2**63 else seed,
        )
        if params.bad_words_token_ids:
            request.bad_words = BadWords(params.bad_words_token_ids, list(token_ids))
        if params.repetition_penalty != 1.0:
            request.seen = self._histogram(request_id, token_ids) > 0
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            request.counts = self._histogram(request_id, token_ids[num_prompt_tokens:])
        self._requests[request_id] = request
        self._batch = None

    def give_up(self, request_id: RequestId, why: str) -> None:
        """Fail a request's rows from now on, for it could not be added."""
        self._unusable[request_id] = why

    def remove(self, request_id: RequestId) -> None:
        """Forget a request; an unknown one is ignored."""
        self._unusable.pop(request_id, None)
        if self._requests.pop(request_id, None) is not None:
            self._batch = None

    def state_of(self, request_id: RequestId) -> SamplingState:
        """What is kept of a request that was added."""
        return self._requests[request_id]

    def sample(
        self, logits: torch.Tensor, request_ids: Sequence[RequestId], *, raw: torch.Tensor | None = None
    ) -> SampledTokens:
        """Choose the next token of each row, and append it to its request's state.

        Should anything raise, each row is sampled by itself, and those at which it raises again have failed; unless it
        does so at all of several rows, or at the only one on a device that may be what is broken.

        Args:
            logits: `[N, V]` float32; not changed.
            request_ids: `[N]`, each added before, none twice.
            raw: the logits as the model computed them, where `logits` come edited.

        Raises:
            ValueError: shapes do not fit, or a request is unknown.
        """
        if logits.shape != (len(request_ids), self._vocab_size) or logits.dtype != torch.float32:
            raise ValueError(
                f"logits must be float32 of shape {(len(request_ids), self._vocab_size)}, "
                f"got {logits.dtype} of shape {tuple(logits.shape)}"
            )
        if not request_ids:
            return SampledTokens([], [], [], [])
        self._check_known(request_ids)
        why: Exception | None = None
        if not self._unusable:
            try:
                return self._sample_together(logits, request_ids, raw)
            except Exception as error:
                why = error
        return self._sample_apart(logits, request_ids, raw, why)

    def _sample_together(
        self, logits: torch.Tensor, request_ids: Sequence[RequestId], raw: torch.Tensor | None
    ) -> SampledTokens:
        """Sample in one batch; if anything raises, no request's state has changed."""
        batch = self._batch_of(request_ids)
        draw_ahead(batch.drawing)
        tokens: torch.Tensor | None = None
        chosen: list[torch.Tensor] = []
        for group in batch.groups:
            chosen.append(choose(logits if group.rows is None else logits.index_select(0, group.rows), group))
            if group.rows is None:
                tokens = chosen[-1]
            else:
                if tokens is None:
                    tokens = torch.empty(len(request_ids), dtype=torch.int64, device=logits.device)
                tokens[group.rows] = chosen[-1]
        assert tokens is not None
        sampled = self._report(batch, logits if raw is None else raw, tokens.tolist())
        self._record(batch, sampled.token_ids)
        for group, of_group in zip(batch.groups, chosen, strict=True):
            if group.processing is not None:
                count(group.processing, of_group)
        return sampled

    def _sample_apart(
        self,
        logits: torch.Tensor,
        request_ids: Sequence[RequestId],
        raw: torch.Tensor | None,
        why: Exception | None,
    ) -> SampledTokens:
        """Sample each row by itself, `why`: as all together raised."""
        if why is not None and is_out_of_memory(why):
            raise why
        sampled = SampledTokens([], [], [], [])
        num_tried = num_raised = 0
        for row, request_id in enumerate(request_ids):
            error = self._unusable.get(request_id, "")
            if not error:
                num_tried += 1
                try:
                    raw_row = None if raw is None else raw[row : row + 1]
                    sampled.extend(self._sample_together(logits[row : row + 1], (request_id,), raw_row))
                    continue
                except Exception as raised:
                    if is_out_of_memory(raised):
                        raise
                    num_raised += 1
                    why, error = why or raised, f"{type(raised).__name__}: {raised}"
            sampled.extend(SampledTokens([-1], [], [], [(request_id, f"its token could not be sampled: {error}")]))
        if why is not None and num_raised == num_tried and (num_tried > 1 or self._device.type != "cpu"):
            raise why
        return sampled

    def _record(self, batch: SamplingBatch, token_ids: list[int]) -> None:
        """Append tokens to the requests' states, but for the penalties' tables."""
        for request, token_id in zip(batch.requests, token_ids, strict=True):
            if token_id < 0:
                continue
            request.num_output_tokens += 1
            if request.bad_words is not None:
                request.bad_words.append(token_id)
            if request.num_output_tokens == request.params.min_tokens:
                self._batch = None  # its end tokens are masked no longer

    def _report(self, batch: SamplingBatch, logits: torch.Tensor, token_ids: list[int]) -> SampledTokens:
        """What tokens to be appended mean; `logits` are the model's."""
        stopped: list[RequestId] = []
        failed: list[tuple[RequestId, str]] = []
        nonfinite: list[RequestId] = []
        for row, (request_id, request, token_id) in enumerate(
            zip(batch.request_ids, batch.requests, token_ids, strict=True)
        ):
            if token_id < 0:
                failed.append((request_id, why_failed(logits[row], request)))
                if why_no_numbers(logits[row]):
                    nonfinite.append(request_id)
                continue
            if token_id in request.stop_token_ids and request.num_output_tokens + 1 >= request.params.min_tokens:
                stopped.append(request_id)
        logprobs: list[tuple[RequestId, TokenLogprobs]] = []
        asked = [row for row in batch.logprob_rows if token_ids[row] >= 0]
        if asked:
            num_tops = [self._num_top(batch.requests[row].params.logprobs) for row in asked]
            entries = token_logprobs(
                logits[asked] if len(asked) < len(token_ids) else logits,
                torch.tensor([token_ids[row] for row in asked], device=logits.device),
                num_tops,
            )
            logprobs = [(batch.request_ids[row], entry) for row, entry in zip(asked, entries, strict=True)]
        return SampledTokens(token_ids, stopped, logprobs, failed, nonfinite)

    def _num_top(self, asked: int | None) -> int:
        return self._vocab_size if asked == -1 else min(asked or 0, self._vocab_size)

    def _batch_of(self, request_ids: Sequence[RequestId]) -> SamplingBatch:
        key = tuple(request_ids)
        if self._batch is None or self._batch.request_ids != key:
            self._batch = self._builder.build(key, [self._requests[request_id] for request_id in key])
        return self._batch

    def _check_known(self, request_ids: Sequence[RequestId]) -> None:
        if self._batch is not None and self._batch.request_ids == tuple(request_ids):
            return
        if len(set(request_ids)) != len(request_ids):
            raise ValueError("a request occurs twice in one batch")
        for request_id in request_ids:
            if request_id not in self._requests and request_id not in self._unusable:
                raise ValueError(f"request {request_id} is not being sampled: add it first")

    def _filtering(self, params: SamplingParams, is_greedy: bool) -> Filtering:
        has_top_k = 0 < params.top_k < self._vocab_size
        if is_greedy or not (has_top_k or params.top_p < 1.0 or params.min_p > 0.0):
            return "none"
        return "narrow" if has_top_k and params.top_k <= sampling.MAX_NARROW_TOP_K else "wide"

    def _histogram(self, request_id: RequestId, token_ids: Sequence[int]) -> torch.Tensor:
        """Count each token: `[V]` float32, exact up to 2**24."""
        ids = torch.tensor(list(token_ids), dtype=torch.int64)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size):
            wrong = next(i for i in token_ids if not 0 <= i < self._vocab_size)
            raise ValueError(self._outside(f"a token of request {request_id}", wrong))
        return torch.bincount(ids, minlength=self._vocab_size).to(self._device, torch.float32)

    def _outside(self, what: str, token_id: int) -> str:
        return f"{what} is {token_id}, outside the vocabulary: it must lie in [0, {self._vocab_size})"

    def _check_ids(self, params: SamplingParams, eos_token_ids: tuple[int, ...]) -> None:
        """Raise `ValueError` for the first id outside the vocabulary."""
        for what, ids in (
            ("an end token", eos_token_ids),
            ("an entry of stop_token_ids", params.stop_token_ids),
            ("an entry of allowed_token_ids", params.allowed_token_ids or ()),
            ("a key of logit_bias", params.logit_bias or ()),
            *(("a token of bad_words", sequence) for sequence in params.bad_words_token_ids),
        ):
            for token_id in ids:
                if not 0 <= token_id < self._vocab_size:
                    raise ValueError(self._outside(what, token_id))
