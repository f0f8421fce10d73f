"""Weights rounded once, beside those that `linear_dense_quick` rounds for each product of 24 rows or more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from c_library import needs_c

from octavo.kernels import linear_rounded as module
from octavo.kernels.linear_dense import linear_dense_quick
from octavo.kernels.linear_rounded import RoundedWeight, linear_rounded, round_weight

pytestmark = needs_c

Numbers = Callable[..., torch.Tensor]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def outliers(*shape: int, seed: int) -> torch.Tensor:
    """Numbers of very different sizes beside each other."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).pow(7).bfloat16()


def alike(*shape: int, seed: int) -> torch.Tensor:
    return torch.full(shape, -1.9921875 + seed / 64).bfloat16()


def rounded(weight: torch.Tensor) -> RoundedWeight:
    made = round_weight(weight)
    if made is None:
        pytest.skip("this processor multiplies bfloat16 otherwise")
    return made


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, where they are numbers, and neither is one elsewhere."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(64, 1), (64, 5), (128, 16), (448, 17), (640, 333), (1088, 9), (1536, 2003)],
)
@pytest.mark.parametrize("numbers", [randn, outliers, alike])
def test_any_number_of_rows_has_the_bits_that_many_have_of_weights_rounded_anew(
    numbers: Numbers, in_features: int, out_features: int
) -> None:
    x, weight = numbers(107, in_features, seed=1), numbers(out_features, in_features, seed=2)
    expected, held = linear_dense_quick(x, weight), rounded(weight)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            for count in (1, 2, 3, 4, 5, 6, 7, 8, 23, 24, 25, 33, 100):
                assert torch.equal(linear_rounded(x[7 : 7 + count], held), expected[7 : 7 + count])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(linear_rounded(x[row : row + 1], held)[0], expected[row]) for row in range(7))


def test_several_passes_of_rows_have_the_same_bits() -> None:
    x, weight = randn(771, 128, seed=3), randn(100, 128, seed=4)
    assert torch.equal(linear_rounded(x, rounded(weight)), linear_dense_quick(x, weight))


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-110, 2.0**-50, 2.0**50, 2.0**110])
def test_tiny_and_huge_weights_have_those_bits_too(scale: float) -> None:
    x, weight = randn(30, 128, seed=7), (randn(20, 128, seed=8).float() * scale).bfloat16()
    expected, held = linear_dense_quick(x, weight), rounded(weight)
    assert same(linear_rounded(x, held), expected)
    assert same(linear_rounded(x[:2], held), expected[:2])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 23, 40])
def test_what_is_not_finite_stays_in_its_row_and_column(count: int) -> None:
    x, weight = randn(40, 256, seed=5), randn(50, 256, seed=6)
    clean = linear_dense_quick(x, weight)
    x[0, 100], weight[9, 200], weight[33, 3] = float("inf"), float("-inf"), float("nan")
    dirty = linear_rounded(x[:count], rounded(weight))
    assert not dirty[0].isfinite().any()
    assert not dirty[:, [9, 33]].isfinite().any()
    columns = [i for i in range(50) if i not in (9, 33)]
    assert torch.equal(dirty[1:][:, columns], clean[1:count][:, columns])
    assert same(dirty, linear_dense_quick(x, weight)[:count])


def test_zeros_and_no_rows_give_nothing() -> None:
    weight = randn(50, 256, seed=6)
    assert not linear_rounded(torch.zeros(3, 256).bfloat16(), rounded(weight)).any()
    assert not linear_rounded(randn(3, 256, seed=5), rounded(torch.zeros_like(weight))).any()
    assert linear_rounded(weight[:0], rounded(weight)).shape == (0, 50)


@pytest.mark.parametrize("numbers", [randn, outliers, alike])
def test_each_weight_is_within_its_bound_and_half_a_group_of_large_ones_is_exact(numbers: Numbers) -> None:
    weight = numbers(37, 192, seed=9)
    meant = rounded(weight).dequantize()
    groups = weight.float().view(37, 3, 64)
    most = groups.abs().amax(-1, keepdim=True)
    assert ((meant.view(37, 3, 64) - groups).abs() <= 2.0**-12 * most).all()
    large = groups.abs() >= most / 16
    assert torch.equal(meant.view(37, 3, 64)[large], groups[large])
    assert rounded(weight).memory.nbytes == 48 * 192 * 2 * 65 // 64


def test_a_wrong_power_of_one_group_is_seen_in_its_column() -> None:
    x, weight = randn(30, 256, seed=1), randn(20, 256, seed=2)
    held, expected = rounded(weight), linear_dense_quick(x, weight)
    powers = held.memory[32 * 256 :].view(torch.bfloat16).view(2, 4, 16)
    powers[1, 2, 3] *= 2  # column 19
    for count in (1, 30):
        differs = (linear_rounded(x[:count], held) != expected[:count]).all(dim=0)
        assert differs.nonzero().flatten().tolist() == [19]


@pytest.mark.parametrize("heights", [(32, 16, 48), (24, 40), (16, 7)])
def test_parts_are_rounded_as_the_matrix_that_they_make(heights: tuple[int, ...]) -> None:
    parts = [outliers(height, 128, seed=height).bfloat16() for height in heights]
    together, whole = round_weight(*parts), rounded(torch.cat(parts))
    assert together is not None and together.shape == whole.shape
    assert torch.equal(together.dequantize(), whole.dequantize())


def test_other_dtypes_sizes_and_processors_are_left_to_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(20, 128, seed=1)
    assert round_weight(weight.float()) is None
    assert round_weight(weight.half()) is None
    assert round_weight(weight[:, :100]) is None
    held = rounded(weight)
    assert torch.equal(rounded(weight.T.contiguous().T).memory, held.memory)
    for x in (weight.float(), weight[:, :64], weight[0]):
        with pytest.raises(ValueError, match="the weight takes"):
            linear_rounded(x, held)
    monkeypatch.setattr(module, "_kernels", lambda: None)
    assert round_weight(weight) is None
