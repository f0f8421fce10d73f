"""Sampling of whole batches: against a naive reference, against the exact distribution, and against company."""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from octavo.actors.executor import sampler as sampler_module
from octavo.actors.executor.sampler import SampledTokens, Sampler
from octavo.actors.executor.token_logprobs import prompt_logprobs
from octavo.kernels import philox
from octavo.messages.ids import RequestId
from octavo.messages.sampling import SamplingParams

VOCAB = 101
Floats = npt.NDArray[np.float64]


def ids(count: int) -> list[RequestId]:
    return [RequestId(i) for i in range(count)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def params_of(rng: random.Random, vocab_size: int = VOCAB, **fixed: object) -> SamplingParams:
    """Draw parameters; each feature is off half of the time."""

    def maybe(value: object, off: object) -> object:
        return value if rng.random() < 0.5 else off

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocab_size), k=count))

    fields: dict[str, object] = {
        "temperature": rng.choice([0.0, 0.3, 0.7, 1.0, 1.5]),
        "top_k": maybe(rng.choice([1, 3, 20, 64, 65, 90, 500]), rng.choice([0, -1])),
        "top_p": maybe(rng.uniform(0.05, 1.0), 1.0),
        "min_p": maybe(rng.uniform(0.0, 0.5), 0.0),
        "presence_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "frequency_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "repetition_penalty": maybe(rng.uniform(0.5, 2), 1.0),
        "logit_bias": maybe({token: rng.uniform(-5, 5) for token in some(4)}, None),
        "allowed_token_ids": maybe(some(40), None),
        "bad_words_token_ids": maybe((some(1), some(2), some(3)), ()),
        "min_tokens": maybe(rng.randrange(5), 0),
        "stop_token_ids": maybe(some(3), ()),
        "logprobs": maybe(rng.choice([0, 3]), None),
        "seed": rng.getrandbits(64),
    }
    return SamplingParams(**(fields | fixed))  # type: ignore[arg-type]


def reference_logits(
    row: Floats, p: SamplingParams, tokens: Sequence[int], num_prompt: int, eos: Sequence[int]
) -> Floats:
    """All processors, one after the other, in float64, token by token."""
    x = row.copy()
    output = tokens[num_prompt:]
    for token in range(len(x)):
        if p.allowed_token_ids is not None and token not in p.allowed_token_ids:
            x[token] = -math.inf
        for word in p.bad_words_token_ids:
            if token == word[-1] and (len(word) == 1 or tuple(tokens[-(len(word) - 1) :]) == word[:-1]):
                x[token] = -math.inf
        if len(output) < p.min_tokens and token in (*eos, *p.stop_token_ids):
            x[token] = -math.inf
        x[token] += (p.logit_bias or {}).get(token, 0.0)
        if token in tokens:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        x[token] -= p.frequency_penalty * output.count(token)
        x[token] -= p.presence_penalty * (token in output)
    return x


def reference_probs(x: Floats, p: SamplingParams) -> tuple[Floats, float]:
    """Temperature and filters; also how close the nearest decision of a filter was."""
    x = x / p.temperature
    probs = np.exp(x - x.max())
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    margin = math.inf
    if p.min_p > 0:
        margin = min(margin, float(np.abs(probs - p.min_p).min()))
        probs[probs < p.min_p] = 0.0
    if 0 < p.top_k < len(x):
        margin = min(margin, float(probs[order[p.top_k - 1]] - probs[order[p.top_k]]) or math.inf)
        probs[order[p.top_k :]] = 0.0
    probs /= probs.sum()
    if p.top_p < 1:
        before = 0.0
        for token in order:
            margin = min(margin, abs(before - p.top_p))
            share = probs[token]
            if before >= p.top_p:
                probs[token] = 0.0
            before += share
    return probs / probs.sum(), margin


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_tokens_are_those_of_a_naive_reference_of_the_whole_chain(seed: int) -> None:
    rng = random.Random(seed)
    sampler = Sampler(VOCAB)
    count = rng.randrange(1, 9)
    eos = (rng.randrange(VOCAB),)
    params = [params_of(rng) for _ in range(count)]
    num_prompt = [rng.randrange(1, 6) for _ in range(count)]
    tokens = [rng.choices(range(VOCAB), k=n + rng.randrange(4)) for n in num_prompt]
    for i in ids(count):
        sampler.add(i, params[i], list(tokens[i]), num_prompt[i], eos)
    for step in range(6):
        logits = randn(count, VOCAB, seed=seed % 2**31 + step)
        sampled = sampler.sample(logits, ids(count))
        failed = dict(sampled.failed)
        for i, token in enumerate(sampled.token_ids):
            p = params[i]
            x = reference_logits(logits[i].double().numpy(), p, tokens[i], num_prompt[i], eos)
            if not np.isfinite(x).any():
                assert token == -1 and "exclude every token" in failed[RequestId(i)]
                continue
            assert RequestId(i) not in failed
            if p.temperature == 0.0:
                assert x[token] >= x.max() - 1e-5
            else:
                probs, margin = reference_probs(x, p)
                position = torch.tensor(len(tokens[i]) - num_prompt[i])
                key = torch.tensor(p.seed - 2**64 if p.seed >= 2**63 else p.seed)
                u = philox.uniform(key, position).item()
                cdf = probs.cumsum()
                # Where float32 may decide a filter otherwise, nothing is claimed but that the token was possible.
                if margin > 1e-5 and np.abs(cdf - u).min() > 1e-5:
                    assert token == np.searchsorted(cdf, u, side="right")
                assert x[token] > -math.inf
            tokens[i].append(token)
            ends = token in (*eos, *p.stop_token_ids) and len(tokens[i]) - num_prompt[i] >= p.min_tokens
            assert (RequestId(i) in sampled.stopped) == ends


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7),
        SamplingParams(top_k=7),
        SamplingParams(top_k=80, temperature=1.5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.05),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
        SamplingParams(temperature=1.3, top_p=0.9, min_p=0.02),
    ],
)
def test_fifty_thousand_draws_follow_the_exact_distribution(params: SamplingParams) -> None:
    num_rows, num_steps = 5000, 10
    sampler = Sampler(VOCAB)
    for i in ids(num_rows):
        fields = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        sampler.add(i, SamplingParams(**fields, seed=1000 + i), [1], 1, ())
    row = randn(1, VOCAB, seed=11)
    logits = row.expand(num_rows, -1).contiguous()
    drawn = [t for _ in range(num_steps) for t in sampler.sample(logits, ids(num_rows)).token_ids]
    probs, _ = reference_probs(row[0].double().numpy(), params)
    observed = np.bincount(drawn, minlength=VOCAB)
    assert observed[probs == 0].sum() == 0
    expected = probs * len(drawn)
    rare = expected < 10  # pooled, as the test's approximation asks
    cells = [*observed[~rare], observed[rare].sum()]
    exact = [*expected[~rare], expected[rare].sum()]
    if exact[-1] == 0:
        cells, exact = cells[:-1], exact[:-1]
    assert stats.chisquare(cells, exact).pvalue > 0.01


class Victim:
    """One request whose logits are a function of its tokens alone, as a model's are."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params = params
        self.tokens = [3, 1, 4]
        self._weights = randn(VOCAB, VOCAB, seed=seed)

    def logits(self) -> torch.Tensor:
        return self._weights[self.tokens[-1]] + 0.5 * self._weights[self.tokens[-2]]

    def add_to(self, sampler: Sampler, request_id: RequestId) -> None:
        sampler.add(request_id, self.params, list(self.tokens), 3, (0,))


def tokens_alone(params: SamplingParams, num_tokens: int, seed: int) -> list[int]:
    victim = Victim(params, seed)
    sampler = Sampler(VOCAB)
    victim.add_to(sampler, RequestId(0))
    for _ in range(num_tokens):
        victim.tokens += sampler.sample(victim.logits().unsqueeze(0), [RequestId(0)]).token_ids
    return victim.tokens[3:]


@pytest.mark.parametrize("seed", range(12))
def test_a_request_has_its_tokens_alone_among_churning_neighbours_and_after_preemption(seed: int) -> None:
    rng = random.Random(seed)
    params = params_of(rng, allowed_token_ids=None)
    num_tokens = 40
    victim = Victim(params, seed)
    sampler = Sampler(VOCAB)
    victim_id = RequestId(0)
    victim.add_to(sampler, victim_id)
    neighbours: list[RequestId] = []
    next_id = 1
    for step in range(num_tokens):
        while len(neighbours) < 63:
            neighbour = RequestId(next_id)
            next_id += 1
            prompt = rng.choices(range(VOCAB), k=5)
            sampler.add(neighbour, params_of(rng, logprobs=None), prompt, 5, (0,))
            neighbours.append(neighbour)
        if rng.random() < 0.2:  # preempted, and taken up again perhaps under the same id
            sampler.remove(victim_id)
            victim.add_to(sampler, victim_id)
        batch = [*neighbours, victim_id]
        rng.shuffle(batch)
        logits = randn(64, VOCAB, seed=step)
        place = batch.index(victim_id)
        logits[place] = victim.logits()
        for row in rng.sample([row for row in range(64) if row != place], 3):
            logits[row] = math.nan
        sampled = sampler.sample(logits, batch)
        victim.tokens.append(sampled.token_ids[place])
        for neighbour in [n for n, _ in sampled.failed] + rng.sample(neighbours, rng.choice([0, 0, 5])):
            if neighbour in neighbours:
                neighbours.remove(neighbour)
                sampler.remove(neighbour)
    assert victim.tokens[3:] == tokens_alone(params, num_tokens, seed)


def test_seeds_make_tokens_and_positions_make_them_differ() -> None:
    first, again, other = (tokens_alone(SamplingParams(temperature=2.0, seed=s), 60, 5) for s in (1, 1, 2))
    assert first == again
    assert first != other
    flat = torch.zeros(1, VOCAB)
    sampler = Sampler(VOCAB)
    sampler.add(RequestId(0), SamplingParams(seed=1), [1], 1, ())
    assert len({sampler.sample(flat, [RequestId(0)]).token_ids[0] for _ in range(60)}) > 30


def test_seeds_of_64_bits_and_negative_ones_are_taken() -> None:
    sampler = Sampler(VOCAB)
    for i, seed in enumerate([0, 2**63, 2**64 - 1, -1]):
        sampler.add(RequestId(i), SamplingParams(seed=seed), [1], 1, ())
    steps = [sampler.sample(torch.zeros(4, VOCAB), ids(4)).token_ids for _ in range(10)]
    zero, high, most, minus_one = zip(*steps, strict=True)
    assert most == minus_one
    assert len({zero, high, most}) == 3


def sample_one(params: SamplingParams, logits: torch.Tensor, eos: tuple[int, ...] = ()) -> SampledTokens:
    sampler = Sampler(logits.shape[1])
    sampler.add(RequestId(7), params, [1, 2], 2, eos)
    return sampler.sample(logits, [RequestId(7)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_that_exclude_everything_fail_the_row_and_no_other(temperature: float) -> None:
    sampler = Sampler(VOCAB)
    impossible = SamplingParams(
        temperature=temperature, seed=1, allowed_token_ids=(5, 6), bad_words_token_ids=((5,), (6,))
    )
    sampler.add(RequestId(0), SamplingParams(temperature=temperature, seed=1), [1], 1, ())
    sampler.add(RequestId(1), impossible, [1], 1, ())
    logits = randn(2, VOCAB)
    sampled = sampler.sample(logits, ids(2))
    assert sampled.token_ids[0] >= 0
    assert sampled.token_ids[1] == -1
    ((failed, message),) = sampled.failed
    assert failed == RequestId(1)
    assert "exclude every token" in message and "relax" in message
    assert not sampled.nonfinite, "the model has computed numbers"


@pytest.mark.parametrize(
    ("value", "word"),
    [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "no finite")],
    ids=["nan", "+inf", "-inf"],
)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(seed=1, logprobs=2),
        SamplingParams(seed=1, top_k=5),
        SamplingParams(seed=1, top_p=0.5),
        SamplingParams(seed=1, repetition_penalty=1.5, frequency_penalty=0.5),
    ],
)
def test_f_14_logits_without_a_number_fail_their_row_and_no_other(
    params: SamplingParams, value: float, word: str
) -> None:
    logits = randn(3, VOCAB)
    logits[1] = value
    sampler = Sampler(VOCAB)
    for i in ids(3):
        sampler.add(i, params, [1], 1, ())
    sampled = sampler.sample(logits, ids(3))
    assert [token >= 0 for token in sampled.token_ids] == [True, False, True]
    ((failed, message),) = sampled.failed
    assert failed == RequestId(1) and word in message
    assert sampled.nonfinite == [RequestId(1)]
    assert [request_id for request_id, _ in sampled.logprobs] == ([0, 2] if params.logprobs else [])
    # The failed row's state has not moved: with good logits it draws what it would have drawn first.
    again = sampler.sample(logits[:1], [RequestId(1)])
    assert again.token_ids == sample_one(params, logits[:1]).token_ids


def test_min_tokens_holds_back_end_and_stop_tokens_until_reached() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 4] = 9.0, 8.0
    sampler = Sampler(10)
    sampler.add(RequestId(0), SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(4,)), [1], 1, (3,))
    steps = [sampler.sample(logits, [RequestId(0)]) for _ in range(3)]
    assert [step.token_ids for step in steps] == [[0], [0], [3]]
    assert [step.stopped for step in steps] == [[], [], [RequestId(0)]]


def test_an_end_token_stops_only_those_that_name_it() -> None:
    logits = torch.zeros(3, 10)
    logits[:, 3] = 9.0
    sampler = Sampler(10)
    greedy = SamplingParams(temperature=0.0)
    sampler.add(RequestId(0), greedy, [1], 1, (3,))
    sampler.add(RequestId(1), greedy, [1], 1, ())
    sampler.add(RequestId(2), SamplingParams(temperature=0.0, stop_token_ids=(3,)), [1], 1, ())
    assert sampler.sample(logits, ids(3)).stopped == [RequestId(0), RequestId(2)]


def test_a_bad_word_may_be_begun_but_not_completed() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 5], logits[0, 6], logits[0, 7] = 9.0, 8.0, 7.0
    sampler = Sampler(10)
    words = ((5, 5, 6), (5, 5, 5))
    sampler.add(RequestId(0), SamplingParams(temperature=0.0, bad_words_token_ids=words), [1], 1, ())
    assert [sampler.sample(logits, [RequestId(0)]).token_ids[0] for _ in range(6)] == [5, 5, 7, 5, 5, 7]


def test_a_bad_word_begun_in_the_prompt_or_before_preemption_is_not_completed() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 6], logits[0, 7] = 9.0, 8.0
    params = SamplingParams(temperature=0.0, bad_words_token_ids=((4, 5, 6),))
    for num_prompt_tokens in (3, 2, 1):
        sampler = Sampler(10)
        sampler.add(RequestId(0), params, [1, 4, 5], num_prompt_tokens, ())
        assert [sampler.sample(logits, [RequestId(0)]).token_ids[0] for _ in range(2)] == [7, 6]


def test_a_removed_request_is_forgotten_at_once() -> None:
    sampler = Sampler(VOCAB)
    sampler.add(RequestId(0), SamplingParams(seed=1), [1], 1, ())
    sampler.sample(randn(1, VOCAB), [RequestId(0)])
    sampler.remove(RequestId(0))
    with pytest.raises(ValueError, match="add it first"):
        sampler.sample(randn(1, VOCAB), [RequestId(0)])


@pytest.mark.parametrize("num_top", [0, 4, -1])
def test_logprobs_are_of_the_raw_logits_whatever_the_processors_do(num_top: int) -> None:
    logits = randn(1, VOCAB)
    params = SamplingParams(seed=3, temperature=0.2, logit_bias={9: 50.0}, top_k=2, logprobs=num_top)
    sampled = sample_one(params, logits)
    ((request_id, entry),) = sampled.logprobs
    expected = torch.log_softmax(logits[0], dim=-1)
    assert request_id == RequestId(7)
    assert sampled.token_ids == [9] == [entry.token_id]
    assert entry.logprob == pytest.approx(expected[9].item(), abs=1e-6)
    assert entry.rank == int((logits[0] > logits[0, 9]).sum()) + 1
    order = sorted(range(VOCAB), key=lambda token: (-expected[token].item(), token))[: None if num_top < 0 else num_top]
    assert [token for token, _ in entry.top] == order
    assert [value for _, value in entry.top] == pytest.approx([expected[token].item() for token in order], abs=1e-6)


def test_rows_with_and_without_logprobs_share_a_batch() -> None:
    sampler = Sampler(VOCAB)
    for i, logprobs in enumerate([None, 2, 0, None, 5]):
        sampler.add(RequestId(i), SamplingParams(temperature=0.0, logprobs=logprobs), [1], 1, ())
    sampled = sampler.sample(randn(5, VOCAB), ids(5))
    assert [(request_id, len(entry.top)) for request_id, entry in sampled.logprobs] == [(1, 2), (2, 0), (4, 5)]
    assert all(entry.token_id == sampled.token_ids[request_id] for request_id, entry in sampled.logprobs)


def test_prompt_logprobs_report_each_target() -> None:
    logits = randn(6, VOCAB)
    targets = [5, 4, 3, 2, 1, 0]
    entries = prompt_logprobs(logits, targets, 3)
    expected = torch.log_softmax(logits, dim=-1)
    assert [entry.token_id for entry in entries] == targets
    for row, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(expected[row, targets[row]].item(), abs=1e-6)
        assert [token for token, _ in entry.top] == expected[row].topk(3).indices.tolist()
    assert len(prompt_logprobs(logits[:1], [0], -1)[0].top) == VOCAB
    assert prompt_logprobs(logits[:0], [], 3) == ()


def test_logits_are_left_as_they_were() -> None:
    rng = random.Random(1)
    for _ in range(20):
        logits = randn(1, VOCAB)
        before = logits.clone()
        sample_one(params_of(rng), logits)
        assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("params", "eos"),
    [
        (SamplingParams(seed=1, stop_token_ids=(VOCAB,)), ()),
        (SamplingParams(seed=1, allowed_token_ids=(1, VOCAB)), ()),
        (SamplingParams(seed=1, logit_bias={VOCAB: 1.0}), ()),
        (SamplingParams(seed=1, bad_words_token_ids=((1, VOCAB),)), ()),
        (SamplingParams(seed=1), (VOCAB,)),
    ],
)
def test_an_id_outside_the_vocabulary_is_refused_by_name(params: SamplingParams, eos: tuple[int, ...]) -> None:
    sampler = Sampler(VOCAB)
    with pytest.raises(ValueError, match=f"is {VOCAB}, outside the vocabulary"):
        sampler.add(RequestId(0), params, [1], 1, eos)
    assert len(sampler) == 0


def test_a_prompt_token_outside_the_vocabulary_is_refused_where_it_would_be_counted() -> None:
    with pytest.raises(ValueError, match="a token of request 0 is -5"):
        Sampler(VOCAB).add(RequestId(0), SamplingParams(seed=1, repetition_penalty=2.0), [1, -5], 2, ())


def test_misuse_is_refused_with_what_to_do() -> None:
    sampler = Sampler(VOCAB)
    sampler.add(RequestId(0), SamplingParams(seed=1), [1], 1, ())
    with pytest.raises(ValueError, match="remove it first"):
        sampler.add(RequestId(0), SamplingParams(seed=1), [1], 1, ())
    with pytest.raises(ValueError, match="without a seed"):
        sampler.add(RequestId(1), SamplingParams(), [1], 1, ())
    with pytest.raises(ValueError, match="allowed_token_ids"):
        sampler.add(RequestId(1), SamplingParams(seed=1, allowed_token_ids=()), [1], 1, ())
    with pytest.raises(ValueError, match="num_prompt_tokens"):
        sampler.add(RequestId(1), SamplingParams(seed=1), [1], 2, ())
    with pytest.raises(ValueError, match="add it first"):
        sampler.sample(torch.zeros(1, VOCAB), [RequestId(9)])
    with pytest.raises(ValueError, match="occurs twice"):
        sampler.sample(torch.zeros(2, VOCAB), [RequestId(0), RequestId(0)])
    with pytest.raises(ValueError, match="float32 of shape"):
        sampler.sample(torch.zeros(1, VOCAB + 1), [RequestId(0)])
    sampler.remove(RequestId(0))
    sampler.remove(RequestId(0))
    assert len(sampler) == 0
    assert sampler.sample(torch.zeros(0, VOCAB), []).token_ids == []


PENALISED = SamplingParams(temperature=0.8, seed=3, frequency_penalty=0.5, presence_penalty=0.2, repetition_penalty=1.3)


@pytest.mark.parametrize("place", ["choose", "_report"])
def test_f_24_a_row_at_which_it_raises_fails_and_what_the_others_are_penalised_for_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def run(is_bad_there: bool) -> list[list[int]]:
        sampler = Sampler(VOCAB)
        kinds = (PENALISED, SamplingParams(temperature=0.0, logprobs=2), SamplingParams(seed=1), PENALISED)
        for request_id, params in zip(ids(4), kinds, strict=True):
            sampler.add(request_id, params, [1, 2, 3], 3, ())
        tokens = []
        for position in range(20):
            rows = ids(4) if is_bad_there else ids(3)
            sampled = sampler.sample(randn(4, VOCAB, seed=position)[: len(rows)], rows)
            assert [request_id for request_id, _ in sampled.failed] == (ids(4)[3:] if is_bad_there else [])
            assert [request_id for request_id, _ in sampled.logprobs] == ids(2)[1:]
            tokens.append(sampled.token_ids[:3])
        return tokens

    expected = run(is_bad_there=False)
    where: Any = sampler_module if place == "choose" else Sampler
    whole = getattr(where, place)
    bad: list[Any] = []
    add = Sampler.add

    def add_and_note(self: Sampler, request_id: RequestId, *arguments: Any) -> None:
        add(self, request_id, *arguments)
        if request_id == 3:
            bad[:] = [self.state_of(request_id)]

    def raise_at_bad(*arguments: Any) -> Any:
        if any(bad[0] in getattr(argument, "requests", ()) for argument in arguments):
            raise IndexError("a defect")
        return whole(*arguments)

    monkeypatch.setattr(Sampler, "add", add_and_note)
    monkeypatch.setattr(where, place, raise_at_bad)
    assert run(is_bad_there=True) == expected


def test_f_24_what_raises_at_every_row_or_for_want_of_memory_is_no_fault_of_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raises(error: Exception) -> Any:
        def choose(*_: Any) -> Any:
            raise error

        return choose

    sampler = Sampler(VOCAB)
    for request_id in ids(3):
        sampler.add(request_id, SamplingParams(temperature=0.0), [1], 1, ())
    monkeypatch.setattr(sampler_module, "choose", raises(IndexError("a defect")))
    with pytest.raises(IndexError, match="a defect"):
        sampler.sample(randn(3, VOCAB), ids(3))
    assert sampler.sample(randn(1, VOCAB), ids(1)).failed, "of one row it must be that one"
    monkeypatch.setattr(sampler_module, "choose", raises(MemoryError("no memory")))
    for rows in (ids(1), ids(3)):
        with pytest.raises(MemoryError):
            sampler.sample(randn(len(rows), VOCAB), rows)


def test_f_24_a_request_that_cannot_be_added_fails_its_rows_until_it_is_removed() -> None:
    sampler = Sampler(VOCAB)
    first, second = ids(2)
    sampler.add(first, SamplingParams(temperature=0.0), [1], 1, ())
    sampler.give_up(second, "ValueError: no")
    logits = randn(2, VOCAB)
    sampled = sampler.sample(logits, (first, second))
    assert sampled.token_ids == [int(logits[0].argmax()), -1]
    assert sampled.failed == [(second, "its token could not be sampled: ValueError: no")]
    sampler.remove(second)
    with pytest.raises(ValueError, match="add it first"):
        sampler.sample(logits, (first, second))
