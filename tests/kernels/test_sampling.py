"""Each sampling function against a plain meaning, and each row against itself in other company."""

import math

import numpy as np
import pytest
import torch
from c_library import HAS_C
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels import sampling

WIDTHS = (1, 2, 63, 64, 65, 127, 128, 1000, 4096, 20_001)


def logits_of(num_rows: int, vocab_size: int, seed: int, *, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits


def best_first(row: torch.Tensor) -> list[int]:
    values = row.tolist()
    return sorted(range(len(values)), key=lambda column: (-values[column], column))


@pytest.fixture(params=["c", "torch"])
def _each_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C library and without."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "_kernels", lambda: None)
    elif not HAS_C:
        pytest.skip("there is no C library")


@pytest.mark.usefixtures("_each_path")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("ties", [False, True])
def test_greedy_takes_the_largest_and_the_lowest_id_among_equals(width: int, ties: bool) -> None:
    logits = logits_of(9, width, 1, ties=ties)
    logits[8, 1:] = -math.inf
    assert sampling.greedy(logits).tolist() == [best_first(row)[0] for row in logits]


@pytest.mark.usefixtures("_each_path")
@pytest.mark.parametrize("width", [10, 130, 1000, 1024, 3001])
@pytest.mark.parametrize("place", [0, 9, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_has_no_token(width: int, place: int, value: float) -> None:
    logits = logits_of(3, width, 2)
    logits[1, place] = value
    ones, half = torch.ones(3), torch.full((3,), 0.5, dtype=torch.float64)
    off = torch.full((3,), -math.inf, dtype=torch.float64)
    k = torch.full((3,), 5)
    for tokens in (
        sampling.greedy(logits),
        sampling.sample(logits, ones, half),
        sampling.sample_filtered(logits, sampling.Filters(ones, k, half, off), half, narrow=True),
        sampling.sample_filtered(logits, sampling.Filters(ones, k, half, off), half, narrow=False),
    ):
        assert (tokens >= 0).tolist() == [True, False, True]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("ties", [False, True])
def test_top_columns_are_the_largest_in_order_with_ties_by_column(width: int, ties: bool) -> None:
    logits = logits_of(4, width, 3, ties=ties)
    logits[0, ::2] = -math.inf
    logits[1, : width // 2] = torch.where(logits[1, : width // 2] > 0, 0.0, -0.0)
    for k in {1, min(5, width), min(64, width), min(700, width), width}:
        assert sampling.top_columns(logits, k).tolist() == [best_first(row)[:k] for row in logits]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_keep_heaviest_keeps_the_shortest_prefix_that_weighs_enough(data: st.DataObject) -> None:
    spread = data.draw(st.sampled_from([2, 50, 2**20, 2**31 - 1]))
    keys_of_row = st.lists(st.integers(-spread - 1, spread), min_size=12, max_size=12)
    rows = data.draw(st.lists(keys_of_row, min_size=1, max_size=3))
    keys = torch.tensor(rows, dtype=torch.int32)
    weights = (keys.to(torch.int64) + 2**31) // 3 + 1
    if data.draw(st.booleans()):
        weights = torch.ones_like(weights)
    share = data.draw(st.floats(0.0, 1.0))
    enough = (weights.sum(-1) * share).to(torch.int64).clamp(min=1)
    expected = torch.zeros(keys.shape, dtype=torch.bool)
    for row in range(len(rows)):
        weight = 0
        for column in best_first(keys[row]):
            if weight >= enough[row]:
                break
            expected[row, column] = True
            weight += int(weights[row, column])
    assert torch.equal(sampling.keep_heaviest(keys, weights, enough), expected)


@pytest.mark.parametrize("width", [1000, 40_000])
@pytest.mark.parametrize("spread", [3, 1000, 2**31 - 1])
def test_keep_heaviest_counts_k_of_a_large_vocabulary(width: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(12)
    keys = torch.randint(-spread - 1, spread + 1, (3, width), generator=generator).to(torch.int32)
    k = torch.tensor([1, 77, width - 1])
    kept = sampling.keep_heaviest(keys, torch.ones_like(keys, dtype=torch.int64), k)
    for row in range(3):
        expected = np.lexsort((np.arange(width), -keys[row].numpy().astype(np.int64)))[: k[row]]
        assert kept[row].nonzero().squeeze(1).tolist() == sorted(expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_invert_cdf_finds_the_column_where_the_cumulative_weight_passes(width: int) -> None:
    weights = torch.rand(1, width, generator=torch.Generator().manual_seed(4))
    weights[:, ::3] = 0.0
    weights[:, width // 2] = 1.0
    exact = weights[0].to(torch.float64).cumsum(0).numpy()
    uniforms = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    uniforms[0], uniforms[1] = 0.0, 1.0 - 2.0**-53
    got = sampling.invert_cdf(weights.expand(400, -1).contiguous(), uniforms).numpy()
    assert (weights[0].numpy()[got] > 0).all()
    target = uniforms.numpy() * exact[-1]
    expected = np.searchsorted(exact, target, side="right")
    margin = np.abs(exact[:, None] - target).min(axis=0) / exact[-1]
    clear = margin > 1e-6  # nearer to a boundary, the float32 sums of chunks may decide otherwise
    assert clear.sum() > 350
    assert (got[clear] == expected[clear]).all()


def test_a_draw_of_zero_passes_over_leading_columns_of_weight_zero() -> None:
    weights = torch.zeros(2, 300)
    weights[0, 200:] = 1.0
    weights[1, 5:] = 1.0
    assert sampling.invert_cdf(weights, torch.zeros(2, dtype=torch.float64)).tolist() == [200, 5]


def test_invert_cdf_of_nothing_is_no_token() -> None:
    weights = torch.zeros(3, 100)
    weights[1, 70] = 1e-30
    weights[2, 3] = math.nan
    assert sampling.invert_cdf(weights, torch.full((3,), 0.9, dtype=torch.float64)).tolist() == [-1, 70, -1]


@pytest.mark.parametrize("width", [5, 64, 1000, 4097])
def test_a_row_alone_has_the_bits_of_that_row_in_a_batch(width: int) -> None:
    logits = logits_of(33, width, 6, ties=True)
    generator = torch.Generator().manual_seed(7)
    temperature = torch.rand(33, generator=generator) + 0.3
    uniforms = torch.rand(33, dtype=torch.float64, generator=generator)
    min_p = (torch.rand(33, dtype=torch.float64, generator=generator) * 0.1).log()
    top_p = torch.rand(33, dtype=torch.float64, generator=generator) * 0.5 + 0.5
    top_k = torch.randint(1, 64, (33,), generator=generator)
    seen = torch.rand(33, width, generator=generator) < 0.5
    counts = torch.randint(0, 4, (33, width), generator=generator).float()
    a, b, c = (torch.rand(33, 1, generator=generator) + 0.5 for _ in range(3))

    def run(rows: slice) -> list[torch.Tensor]:
        processed = logits[rows].clone()
        sampling.penalize_repetition(processed, seen[rows], a[rows])
        sampling.penalize_counts(processed, counts[rows], b[rows], c[rows])
        filters = sampling.Filters(temperature, top_k, top_p, min_p).of_rows(rows)
        probs = torch.softmax(processed / temperature[rows].unsqueeze(1), dim=-1)
        return [
            processed,
            probs,
            probs[:, : width // 64 * 64].unflatten(-1, (-1, 64)).sum(-1) if width >= 64 else probs,
            sampling.greedy(processed),
            sampling.sample(processed, temperature[rows], uniforms[rows]),
            sampling.sample_filtered(processed, filters, uniforms[rows], narrow=True),
            sampling.sample_filtered(processed, filters, uniforms[rows], narrow=False),
            *sampling.logprobs_of(processed, torch.zeros_like(top_k[rows]), min(20, width)),
        ]

    together = run(slice(0, 33))
    for start, stop in ((0, 1), (7, 8), (32, 33), (3, 12)):
        for whole, part in zip(together, run(slice(start, stop)), strict=True):
            assert torch.equal(whole[start:stop], part)


@pytest.mark.parametrize("num_top", [0, 1, 20, 1000])
def test_logprobs_are_torchs_with_ranks_and_order(num_top: int) -> None:
    logits = logits_of(5, 1000, 8, ties=True)
    tokens = torch.tensor([0, 999, 5, 500, 17])
    chosen, ranks, top_ids, top = sampling.logprobs_of(logits, tokens, num_top)
    expected = torch.log_softmax(logits.double(), dim=-1)
    torch.testing.assert_close(chosen.double(), expected.gather(1, tokens.unsqueeze(1)).squeeze(1), atol=1e-5, rtol=0)
    assert ranks.tolist() == [int((row > row[token]).sum()) + 1 for row, token in zip(logits, tokens, strict=True)]
    assert top_ids.tolist() == [best_first(row)[:num_top] for row in logits]
    torch.testing.assert_close(top.double(), expected.gather(1, top_ids), atol=1e-5, rtol=0)


def test_work_in_blocks_of_rows_gives_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(50, 300, 9)
    ones = torch.ones(50)
    uniforms = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    whole = sampling.sample(logits, ones, uniforms)
    monkeypatch.setattr(sampling, "_ELEMENTS_PER_BLOCK", 1000)
    assert [block.stop - block.start for block in sampling.row_blocks(50, 300)] == [3] * 16 + [2]
    assert torch.equal(sampling.sample(logits, ones, uniforms), whole)
