"""The sampling state of the executor's requests, and its application to a batch.

The order is vLLM's: log-probabilities are taken from the raw logits; then allowed token ids, bad words, `min_tokens`,
logit bias, penalties (repetition, frequency, presence), and for rows that are not greedy temperature, min-p, top-k,
top-p and the draw.

A row's token is a function of its logits, its parameters, its tokens so far, and the uniform number keyed by
(seed, number of output tokens so far): not of its place in the batch, of other rows, or of having been preempted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ...kernels import philox, sampling
from ...messages.ids import RequestId
from ...messages.request import TokenLogprobs
from ...messages.sampling import SamplingParams

_NUM_DRAWS_AHEAD = 16  # uniforms made per request at once: the generator costs about 0.1 ms however few are asked for


_Filtering = Literal["none", "narrow", "wide"]
"""How top-k, top-p and min-p are applied: not at all, to a few likely tokens, or to the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What one step sampled.

    Attributes:
        token_ids: one for each row, in order; -1 for a failed row.
        stopped: rows whose token is an end or stop token, with `min_tokens` reached.
        logprobs: for the rows that asked.
        failed: `(request_id, message)` for rows from which no token could be chosen; their state has not changed.
    """

    token_ids: list[int]
    stopped: list[RequestId]
    logprobs: list[tuple[RequestId, TokenLogprobs]]
    failed: list[tuple[RequestId, str]]


class _BadWords:
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
class _Request:
    """Sampling state of one request; its owner is the `Sampler`."""

    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    stop_token_ids: frozenset[int]
    num_output_tokens: int
    is_greedy: bool
    filtering: _Filtering
    seed: int  # the unsigned 64 bits, reinterpreted as signed
    bad_words: _BadWords | None = None
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


@dataclass(slots=True)
class _Pairs:
    """Pairs (row, token id) to be touched, for rows counted inside a group."""

    rows: torch.Tensor
    token_ids: torch.Tensor


@dataclass(slots=True)
class _Processing:
    """What changes the logits of a group's rows, gathered into tensors once per batch."""

    requests: list[_Request]
    allowed: _Pairs | None
    below_min_tokens: _Pairs | None
    bias: _Pairs | None
    bias_values: torch.Tensor
    bad_words: list[tuple[int, _BadWords]]
    repetition_rows: torch.Tensor
    seen: torch.Tensor | None  # [M, V]; the requests' own `seen` are its rows
    repetition: torch.Tensor
    count_rows: torch.Tensor
    counts: torch.Tensor | None  # [M, V]; likewise
    frequency: torch.Tensor
    presence: torch.Tensor


@dataclass(slots=True)
class _Group:
    """Rows of a batch that need the same work; every row is in exactly one group."""

    requests: list[_Request]
    rows: torch.Tensor | None  # [M] int64; None: the whole batch
    is_greedy: bool
    filtering: _Filtering
    filters: sampling.Filters
    processing: _Processing | None


@dataclass(slots=True)
class _Batch:
    """Parameters of a batch as tensors, kept while the same requests come step after step."""

    request_ids: tuple[RequestId, ...]
    requests: list[_Request]
    groups: list[_Group]
    logprob_rows: list[int]
    drawing: list[_Request]  # those that are not greedy


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
        self._requests: dict[RequestId, _Request] = {}
        self._batch: _Batch | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def add(
        self,
        request_id: RequestId,
        params: SamplingParams,
        token_ids: list[int],
        num_prompt_tokens: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """Take a request on, new or again after preemption.

        Args:
            request_id: not yet known here.
            params: with `seed` filled in, unless greedy.
            token_ids: prompt, then outputs so far.
            num_prompt_tokens: how many of them are the prompt's.
            eos_token_ids: the model's end tokens; empty under `ignore_eos`.

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
        is_greedy = params.temperature < sampling.GREEDY_EPS
        if params.seed is None and not is_greedy:
            raise ValueError(f"request {request_id} draws at random without a seed: fill in params.seed")
        seed = (params.seed or 0) % 2**64
        request = _Request(
            params=params,
            eos_token_ids=eos_token_ids,
            stop_token_ids=frozenset((*eos_token_ids, *params.stop_token_ids)),
            num_output_tokens=len(token_ids) - num_prompt_tokens,
            is_greedy=is_greedy,
            filtering=self._filtering(params, is_greedy),
            seed=seed - 2**64 if seed >= 2**63 else seed,
        )
        if params.bad_words_token_ids:
            request.bad_words = _BadWords(params.bad_words_token_ids, token_ids)
        if params.repetition_penalty != 1.0:
            request.seen = self._histogram(request_id, token_ids) > 0
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            request.counts = self._histogram(request_id, token_ids[num_prompt_tokens:])
        self._requests[request_id] = request
        self._batch = None

    def remove(self, request_id: RequestId) -> None:
        """Forget a request; an unknown one is ignored."""
        if self._requests.pop(request_id, None) is not None:
            self._batch = None

    def sample(self, logits: torch.Tensor, request_ids: Sequence[RequestId]) -> SampledTokens:
        """Choose the next token of each row, and append it to its request's state.

        Args:
            logits: `[N, V]` float32; not changed.
            request_ids: `[N]`, each added before, none twice.

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
        batch = self._batch_of(request_ids)
        _draw_ahead(batch.drawing)
        tokens: torch.Tensor | None = None
        for group in batch.groups:
            chosen = _choose(logits if group.rows is None else logits.index_select(0, group.rows), group)
            if group.rows is None:
                tokens = chosen
            else:
                if tokens is None:
                    tokens = torch.empty(len(request_ids), dtype=torch.int64, device=logits.device)
                tokens[group.rows] = chosen
            if group.processing is not None:
                _count(group.processing, chosen)
        assert tokens is not None
        return self._record(batch, logits, tokens.tolist())

    def _record(self, batch: _Batch, logits: torch.Tensor, token_ids: list[int]) -> SampledTokens:
        """Append tokens to the requests' states and report."""
        stopped: list[RequestId] = []
        failed: list[tuple[RequestId, str]] = []
        for row, (request_id, request, token_id) in enumerate(
            zip(batch.request_ids, batch.requests, token_ids, strict=True)
        ):
            if token_id < 0:
                failed.append((request_id, _why_failed(logits[row], request)))
                continue
            request.num_output_tokens += 1
            if request.bad_words is not None:
                request.bad_words.append(token_id)
            min_tokens = request.params.min_tokens
            if request.num_output_tokens == min_tokens:
                self._batch = None  # its end tokens are masked no longer
            if token_id in request.stop_token_ids and request.num_output_tokens >= min_tokens:
                stopped.append(request_id)
        logprobs: list[tuple[RequestId, TokenLogprobs]] = []
        asked = [row for row in batch.logprob_rows if token_ids[row] >= 0]
        if asked:
            num_tops = [self._num_top(batch.requests[row].params.logprobs) for row in asked]
            entries = _token_logprobs(
                logits[asked] if len(asked) < len(token_ids) else logits,
                torch.tensor([token_ids[row] for row in asked], device=logits.device),
                num_tops,
            )
            logprobs = [(batch.request_ids[row], entry) for row, entry in zip(asked, entries, strict=True)]
        return SampledTokens(token_ids, stopped, logprobs, failed)

    def _num_top(self, asked: int | None) -> int:
        return self._vocab_size if asked == -1 else min(asked or 0, self._vocab_size)

    def _batch_of(self, request_ids: Sequence[RequestId]) -> _Batch:
        key = tuple(request_ids)
        if self._batch is None or self._batch.request_ids != key:
            self._batch = self._build_batch(key)
        return self._batch

    def _build_batch(self, request_ids: tuple[RequestId, ...]) -> _Batch:
        if len(set(request_ids)) != len(request_ids):
            raise ValueError("a request occurs twice in one batch")
        try:
            requests = [self._requests[request_id] for request_id in request_ids]
        except KeyError as error:
            raise ValueError(f"request {error.args[0]} is not being sampled: add it first") from None
        by_need: dict[tuple[bool, _Filtering, bool], list[int]] = {}
        for row, request in enumerate(requests):
            by_need.setdefault((request.is_greedy, request.filtering, request.is_processed), []).append(row)
        groups = [
            self._build_group([requests[row] for row in rows], rows if len(by_need) > 1 else None, *need)
            for need, rows in by_need.items()
        ]
        return _Batch(
            request_ids=request_ids,
            requests=requests,
            groups=groups,
            logprob_rows=[row for row, request in enumerate(requests) if request.params.logprobs is not None],
            drawing=[request for request in requests if not request.is_greedy],
        )

    def _build_group(
        self,
        requests: list[_Request],
        rows: list[int] | None,
        is_greedy: bool,
        filtering: _Filtering,
        is_processed: bool,
    ) -> _Group:
        params = [request.params for request in requests]
        return _Group(
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
            processing=self._build_processing(requests) if is_processed else None,
        )

    def _build_processing(self, requests: list[_Request]) -> _Processing:
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
        return _Processing(
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

    def _pairs(self, rows_and_ids: Iterable[tuple[int, Sequence[int]]]) -> _Pairs | None:
        rows: list[int] = []
        token_ids: list[int] = []
        for row, ids in rows_and_ids:
            rows.extend([row] * len(ids))
            token_ids.extend(ids)
        return _Pairs(self._ints(rows), self._ints(token_ids)) if rows else None

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _filtering(self, params: SamplingParams, is_greedy: bool) -> _Filtering:
        has_top_k = 0 < params.top_k < self._vocab_size
        if is_greedy or not (has_top_k or params.top_p < 1.0 or params.min_p > 0.0):
            return "none"
        return "narrow" if has_top_k and params.top_k <= sampling.MAX_NARROW_TOP_K else "wide"

    def _histogram(self, request_id: RequestId, token_ids: list[int]) -> torch.Tensor:
        """Count each token: `[V]` float32, exact up to 2**24."""
        ids = torch.tensor(token_ids, dtype=torch.int64)
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


def prompt_logprobs(logits: torch.Tensor, target_ids: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """Report how likely a prompt's tokens were, each after those before it.

    Args:
        logits: `[n, V]` float32; row i predicts `target_ids[i]`.
        target_ids: the prompt's next tokens.
        num_top: alternatives to report; -1 means the vocabulary.
    """
    if not target_ids:
        return ()
    vocab_size = logits.shape[1]
    count = vocab_size if num_top == -1 else min(num_top, vocab_size)
    targets = torch.tensor(target_ids, dtype=torch.int64, device=logits.device)
    return tuple(_token_logprobs(logits, targets, [count] * len(target_ids)))


def _token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_tops: list[int]) -> list[TokenLogprobs]:
    entries: list[TokenLogprobs] = []
    for block in sampling.row_blocks(*logits.shape):
        counts = num_tops[block]
        chosen, ranks, top_ids, top_logprobs = sampling.logprobs_of(logits[block], token_ids[block], max(counts))
        rows = zip(
            token_ids[block].tolist(),
            chosen.tolist(),
            ranks.tolist(),
            top_ids.tolist(),
            top_logprobs.tolist(),
            counts,
            strict=True,
        )
        for token_id, logprob, rank, ids, values, count in rows:
            top = tuple(zip(ids[:count], values[:count], strict=True))
            entries.append(TokenLogprobs(token_id=token_id, logprob=logprob, rank=rank, top=top))
    return entries


def _draw_ahead(requests: list[_Request]) -> None:
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


def _choose(logits: torch.Tensor, group: _Group) -> torch.Tensor:
    """Choose a token for each row of a group: `[M]` int64, -1 where there is none."""
    if group.processing is not None:
        if group.rows is None:
            logits = logits.clone()  # the caller's; a selection of rows is a copy already
        _process(logits, group.processing)
    if group.is_greedy:
        return sampling.greedy(logits)
    uniforms = torch.tensor(
        [r.draws[r.num_output_tokens - r.first_draw] for r in group.requests],
        dtype=torch.float64,
        device=logits.device,
    )
    if group.filtering != "none":
        return sampling.sample_filtered(logits, group.filters, uniforms, narrow=group.filtering == "narrow")
    return sampling.sample(logits, group.filters.temperature, uniforms)


def _process(logits: torch.Tensor, processing: _Processing) -> None:
    """Apply masks, bias and penalties in place."""
    if (allowed := processing.allowed) is not None:
        sampling.keep_allowed(logits, allowed.rows, allowed.token_ids)
    if processing.bad_words:
        rows: list[int] = []
        token_ids: list[int] = []
        for row, bad_words in processing.bad_words:
            forbidden = bad_words.forbidden()
            rows.extend([row] * len(forbidden))
            token_ids.extend(forbidden)
        if rows:
            sampling.exclude(
                logits, torch.tensor(rows, device=logits.device), torch.tensor(token_ids, device=logits.device)
            )
    if (below := processing.below_min_tokens) is not None:
        sampling.exclude(logits, below.rows, below.token_ids)
    if (bias := processing.bias) is not None:
        sampling.add_bias(logits, bias.rows, bias.token_ids, processing.bias_values)
    whole = logits.shape[0]
    if processing.seen is not None:
        part = logits if len(processing.seen) == whole else logits[processing.repetition_rows]
        sampling.penalize_repetition(part, processing.seen, processing.repetition)
        if part is not logits:
            logits[processing.repetition_rows] = part
    if processing.counts is not None:
        part = logits if len(processing.counts) == whole else logits[processing.count_rows]
        sampling.penalize_counts(part, processing.counts, processing.frequency, processing.presence)
        if part is not logits:
            logits[processing.count_rows] = part


def _count(processing: _Processing, chosen: torch.Tensor) -> None:
    """Enter the chosen tokens into the penalties' tables; a failed row enters nothing."""
    for table, rows in ((processing.seen, processing.repetition_rows), (processing.counts, processing.count_rows)):
        if table is None:
            continue
        tokens = chosen[rows]
        places = (tokens >= 0).nonzero().squeeze(1)
        if table.dtype == torch.bool:
            table[places, tokens[places]] = True
        else:
            table[places, tokens[places]] += 1.0


def _why_failed(row: torch.Tensor, request: _Request) -> str:
    """Say why no token could be chosen from a row of raw logits."""
    if bool(row.isnan().any()):
        return "the model computed NaN logits for this request"
    if bool((row == math.inf).any()):
        return "the model computed infinite logits for this request"
    if not bool(row.isfinite().any()):
        return "the model computed no finite logit for this request"
    return (
        f"allowed_token_ids, bad_words and min_tokens together exclude every token at output position "
        f"{request.num_output_tokens}: relax one of them"
    )
