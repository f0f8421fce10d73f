"""Log-probabilities, ranks and the likeliest tokens, by the kernels, against their meaning."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.kernels import sampling
from octavo.kernels.gpu import logprobs as gpu
from octavo.kernels.gpu import sampling_stats


@pytest.mark.parametrize(
    ("vocab_size", "num_top", "ties"), [(1, 1, False), (64, 20, True), (700, 0, False), (700, 5, True)]
)
def test_logprobs_ranks_and_order_are_those_of_the_meaning(
    vocab_size: int, num_top: int, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_stats, "CHUNK_SIZE", 256)
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(8)) * 3
    if ties:
        logits = (logits * 2).round() / 2
        logits[1, : vocab_size - 5] = -math.inf
        logits[2] = 0.0
    tokens = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    ours = gpu.logprobs_on_device(logits, tokens, num_top)
    theirs = sampling.logprobs_of(logits, tokens, num_top)
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-6, rtol=0)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[2])
    torch.testing.assert_close(ours[3], theirs[3], atol=2e-6, rtol=0)


def test_a_row_alone_has_the_bits_of_that_row_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_stats, "CHUNK_SIZE", 256)
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(9))
    tokens = torch.tensor([3, 400, 77])
    together = gpu.logprobs_on_device(logits, tokens, 3)
    alone = gpu.logprobs_on_device(logits[2:], tokens[2:], 3)
    for whole, part in zip(together, alone, strict=True):
        assert torch.equal(whole[2:], part)


def test_a_row_with_nan_has_no_logprob_and_no_rows_are_no_work() -> None:
    logits = torch.zeros(1, 70)
    logits[0, 69] = math.nan
    logprob, _, top_ids, _ = gpu.logprobs_on_device(logits, torch.zeros(1, dtype=torch.int64), 2)
    assert math.isnan(logprob[0])
    assert ((top_ids >= 0) & (top_ids < 70)).all()
    empty = gpu.logprobs_on_device(logits[:0], torch.zeros(0, dtype=torch.int64), 2)
    assert [tuple(x.shape) for x in empty] == [(0,), (0,), (0, 2), (0, 2)]


def test_more_likeliest_tokens_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="num_top"):
        gpu.logprobs_on_device(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64), 6)
