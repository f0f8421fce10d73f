"""Bias, exclusions and penalties of standing requests: the kernel against its meaning."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from octavo.actors.executor.gpu.logit_edits import NO_EDITS, LogitEdits, edits_of
from octavo.actors.executor.gpu.step_diff import StepDiff
from octavo.kernels.gpu import logit_processing as gpu
from octavo.kernels.logit_processing import MAX_PROGRAMS, memory_bytes, process_logits_ref
from octavo.kernels.step_inputs import apply_diff
from octavo.kernels.step_layout import MAX_EDITS, PARAM_WORDS, StepLayout
from octavo.messages.ids import RequestId
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StartRequest


class Standing:
    """Requests that stand in rows of their own, their outputs appended to their prompts."""

    def __init__(self, vocab_size: int, max_model_len: int = 60, max_rows: int = 8) -> None:
        self.vocab_size, self.layout = vocab_size, StepLayout(max_rows, max_model_len, 4)
        self.num_rows = 0
        self.state = torch.full((3 * max_rows, self.layout.row_words), 77, dtype=torch.int32)
        self.packed = torch.zeros(self.layout.diff, dtype=torch.int32)
        self.packed[self.layout.sample_rows :][: self.layout.section] = -1

    def add(self, params: SamplingParams, prompt: list[int], outputs: list[int], eos: tuple[int, ...] = ()) -> None:
        tokens = np.array(prompt + outputs, dtype=np.int32)
        start = StartRequest(RequestId(self.num_rows), tokens.tobytes(), len(prompt), 0, params, eos)
        edits = edits_of(start, self.vocab_size)
        assert edits is not None
        diff = StepDiff(self.layout)
        row = (5 * self.num_rows + 2) % len(self.state)
        diff.write_start(row, start, (1, 2), 0, edits)
        words = torch.zeros(diff.packed_words, dtype=torch.int32)
        diff.pack(words.numpy())
        apply_diff(self.state, words, self.layout)
        self.packed[self.layout.sample_rows + self.num_rows] = row
        self.packed[self.layout.sample_columns + self.num_rows] = len(tokens)
        self.num_rows += 1

    def pad(self) -> None:
        """A row of the step that samples nothing."""
        self.num_rows += 1

    def meant(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        process_logits_ref(logits, self.state, self.packed, self.layout)
        return logits

    def ours(self, logits: torch.Tensor, num_programs: int = 3) -> torch.Tensor:
        logits = logits.clone()
        counts = torch.zeros((num_programs, self.vocab_size), dtype=torch.int32)
        before = self.state.clone()
        gpu.process_logits(logits, self.state, self.packed, counts, self.layout)
        assert not counts.any(), "the next step counts from zero"
        assert torch.equal(self.state, before)
        return logits


def randn(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    def maybe(value: object, off: object) -> object:
        return value if rng.random() < 0.5 else off

    some = tuple(rng.sample(range(vocab_size), k=min(5, vocab_size // 8)))
    return SamplingParams(
        repetition_penalty=maybe(rng.uniform(0.5, 2.0), 1.0),  # type: ignore[arg-type]
        frequency_penalty=maybe(rng.uniform(-2.0, 2.0), 0.0),  # type: ignore[arg-type]
        presence_penalty=maybe(rng.uniform(-2.0, 2.0), 0.0),  # type: ignore[arg-type]
        logit_bias=maybe({token: rng.uniform(-9.0, 9.0) for token in some}, None),  # type: ignore[arg-type]
        bad_words_token_ids=maybe((some[:1], some[1:2]), ()),  # type: ignore[arg-type]
        min_tokens=maybe(rng.randrange(6), 0),  # type: ignore[arg-type]
        stop_token_ids=maybe(some[2:4], ()),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("vocab_size", [17, 300])
@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_changes_logits_to_the_bits_of_its_meaning(vocab_size: int, seed: int) -> None:
    rng = random.Random(seed)
    standing = Standing(vocab_size)
    for index in range(7):
        if index == 3:
            standing.pad()
        prompt = rng.choices(range(min(vocab_size, 30)), k=rng.randint(1, 40))
        outputs = rng.choices(range(vocab_size), k=rng.choice([0, 1, 5, 19]))
        standing.add(random_params(rng, vocab_size), prompt, outputs, eos=(rng.randrange(vocab_size),))
    logits = randn(8, vocab_size, seed)
    ours, meant = standing.ours(logits), standing.meant(logits)
    assert torch.equal(ours, meant)
    assert torch.equal(ours[3], logits[3])
    assert not torch.equal(ours, logits)
    # A row's bits are the same whatever program takes it, and whatever it has taken before.
    assert torch.equal(standing.ours(logits, num_programs=8), ours)
    assert torch.equal(standing.ours(logits[:5]), ours[:5])


def test_long_requests_are_counted_block_by_block() -> None:
    standing = Standing(40, max_model_len=3000, max_rows=2)
    everything = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.1, presence_penalty=0.7)
    rng = random.Random(1)
    standing.add(everything, rng.choices(range(20), k=1024), rng.choices(range(30), k=1025))
    standing.add(everything, rng.choices(range(40), k=1), rng.choices(range(40), k=1023))
    logits = randn(2, 40, 5)
    ours = standing.ours(logits, num_programs=1)
    assert torch.equal(ours, standing.meant(logits))
    assert (ours != logits).sum() == 30 + 40


def test_tokens_that_are_none_are_not_counted() -> None:
    """A request that failed has -1 for its token, and goes on until the host has heard of it."""
    standing = Standing(20, max_rows=2)
    repeats = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)
    standing.add(repeats, [3, 3, 2**31 - 1], [-1, 20, 4, -1])
    logits = torch.ones(1, 20)
    ours = standing.ours(logits)
    assert torch.equal(ours, standing.meant(logits))
    assert ours[0, 3] == 0.5
    assert ours[0, 4] == -0.5
    assert (ours == 1.0).sum() == 18


def test_exclusions_hold_whatever_a_logit_is_and_others_keep_what_is_no_number() -> None:
    standing = Standing(30, max_rows=2)
    params = SamplingParams(
        logit_bias={1: 5.0, 2: -1.0, 7: 2.0}, bad_words_token_ids=((1,),), min_tokens=1, stop_token_ids=(2, 3)
    )
    standing.add(params, [4], [], eos=(5,))
    standing.add(params, [4], [9], eos=(5,))
    logits = torch.zeros(2, 30)
    logits[:, 1:4] = torch.tensor([torch.inf, torch.nan, 1.0])
    logits[:, 6] = torch.nan
    ours, meant = standing.ours(logits), standing.meant(logits)
    assert torch.equal(ours.nan_to_num(nan=55.0), meant.nan_to_num(nan=55.0))
    assert ours[0, [1, 2, 3, 5]].tolist() == [-torch.inf] * 4
    assert ours[1, [1, 3, 5]].tolist() == [-torch.inf, 1.0, 0.0]  # with min_tokens reached, but for the bad word
    assert ours[1, 2].isnan()
    assert ours[:, 6].isnan().all()
    assert ours[:, 7].tolist() == [2.0, 2.0]


def test_as_many_edits_as_there_is_room_for_are_applied_and_more_are_refused() -> None:
    vocab_size = MAX_EDITS + 2
    standing = Standing(vocab_size, max_rows=2)
    bias = {token: float(token % 7) + 1 for token in range(MAX_EDITS - 1)}
    standing.add(SamplingParams(logit_bias=bias, min_tokens=3), [1], [], eos=(MAX_EDITS,))
    logits = randn(1, vocab_size, 3)
    ours = standing.ours(logits)
    assert torch.equal(ours, standing.meant(logits))
    assert (ours != logits).sum() == MAX_EDITS

    def refused(params: SamplingParams, *eos: int, vocab_size: int = vocab_size) -> bool:
        return edits_of(StartRequest(RequestId(0), b"", 0, 0, params, eos), vocab_size) is None

    assert not refused(SamplingParams(logit_bias=bias, min_tokens=3), 0)
    assert refused(SamplingParams(logit_bias=bias, min_tokens=3), 0, 1)
    assert not refused(SamplingParams(logit_bias=bias), 0, 1), "without min_tokens end tokens are no matter"
    assert refused(SamplingParams(min_tokens=1, stop_token_ids=(0, 1)), 2, vocab_size=3), "nothing would be left"


def test_what_is_told_of_its_memory_is_what_it_takes() -> None:
    vocab_size, layout = 50, StepLayout(300, 10, 4)
    without_edits = layout.edits - PARAM_WORDS
    taken = 4 * (3 * (layout.row_words - without_edits) + MAX_PROGRAMS * vocab_size)
    assert memory_bytes(3, vocab_size) == taken


def test_products_and_sums_are_rounded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU one instruction could do both, with other bits than the sampler has on the host."""
    options: dict[str, object] = {}
    kernel = {(1,): lambda *_, **asked: options.update(asked)}
    monkeypatch.setattr(gpu, "_process_logits_kernel", kernel)
    standing = Standing(20, max_rows=2)
    gpu.process_logits(randn(1, 20, 1), standing.state, standing.packed, torch.zeros(1, 20), standing.layout)
    assert options["enable_fp_fusion"] is False


def test_a_request_that_asks_for_nothing_changes_nothing() -> None:
    assert edits_of(StartRequest(RequestId(0), b"", 0, 0, SamplingParams(), (1,)), 10) is NO_EDITS
    assert LogitEdits() == NO_EDITS
    standing = Standing(20, max_rows=2)
    standing.add(SamplingParams(), [1, 2], [3])
    logits = randn(1, 20, 1)
    assert torch.equal(standing.ours(logits), logits)
    assert torch.equal(standing.meant(logits), logits)
    gpu.process_logits(logits[:0], standing.state, standing.packed, torch.zeros(1, 20), standing.layout)
