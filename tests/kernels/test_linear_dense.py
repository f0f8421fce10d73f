from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from c_library import HAS_C, needs_c

from octavo.kernels import linear_dense as module
from octavo.kernels.linear_dense import linear_dense, linear_dense_quick, linear_dense_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 16, 17, 33])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 16), (1024, 100), (100, 7), (13, 1), (48, 49)])
def test_it_is_as_exact_as_torch_and_batch_invariant(
    num_tokens: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    x = randn(num_tokens, in_features, seed=1, dtype=dtype)
    weight = randn(out_features, in_features, seed=2, dtype=dtype)
    exact = linear_dense_ref(x.double(), weight.double())
    ours, theirs = linear_dense(x, weight), linear_dense_ref(x, weight)
    assert ours.dtype is dtype
    least = torch.finfo(torch.float32).eps * exact.abs().max()  # where theirs is exact by chance
    assert (ours - exact).abs().max() <= max(2 * (theirs - exact).abs().max(), least)
    if HAS_C:
        for row in range(num_tokens):
            assert torch.equal(linear_dense(x[row : row + 1], weight), ours[row : row + 1])


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features"),
    # Several blocks of inputs, of rows, of columns and of passes, each with a remainder.
    [(100, 2100, 70), (194, 1024, 131), (770, 40, 36), (771, 1032, 9), (5, 3072, 300)],
)
def test_blocks_and_threads_change_no_bit(
    num_tokens: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    x = randn(num_tokens, in_features, seed=3, dtype=dtype)
    weight = randn(out_features, in_features, seed=4, dtype=dtype)
    exact = linear_dense_ref(x.double(), weight.double())
    ours, theirs = linear_dense(x, weight), linear_dense_ref(x, weight)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    for first in (0, 1, 95, 96, num_tokens - 3):
        for count in (1, 2, 3, 4, 50):
            part = x[first : first + count]
            assert torch.equal(linear_dense(part, weight), ours[first : first + count])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear_dense(x, weight), ours)
    finally:
        torch.set_num_threads(num_threads)


@needs_c
def test_a_nan_stays_in_its_row_and_nothing_gives_zero() -> None:
    x, weight = randn(33, 1100, seed=5), randn(20, 1100, seed=6)
    clean = linear_dense(x, weight)
    x[17, 1050] = float("nan")
    dirty = linear_dense(x, weight)
    assert dirty[17].isnan().all()
    assert torch.equal(dirty[:17], clean[:17])
    assert torch.equal(dirty[18:], clean[18:])
    assert linear_dense(x[:0], weight).shape == (0, 20)
    assert not linear_dense(torch.zeros(2, 0).bfloat16(), torch.zeros(20, 0).bfloat16()).any()


def test_a_bias_is_added_to_what_was_rounded() -> None:
    x, weight, bias = randn(3, 32, seed=1), randn(8, 32, seed=2), randn(8, seed=3)
    torch.testing.assert_close(linear_dense(x, weight, bias), linear_dense(x, weight) + bias)


def test_other_dtypes_and_a_missing_library_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = randn(3, 32, seed=1), randn(8, 32, seed=2), randn(8, seed=3)
    assert torch.equal(linear_dense(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    monkeypatch.setattr(module, "_kernels", lambda: None)
    assert torch.equal(linear_dense(x, weight, bias), F.linear(x, weight, bias))


@needs_c
def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="features"):
        linear_dense(randn(3, 32, seed=1), randn(8, 31, seed=2))


@pytest.mark.parametrize("num_tokens", [1, 4, 7, 40])
@pytest.mark.parametrize("in_features", [64, 100, 1100])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_the_same_numbers_as_in_float32(
    stored: torch.dtype, in_features: int, num_tokens: int
) -> None:
    x = randn(num_tokens, in_features, seed=1, dtype=torch.float32)
    weight = randn(30, in_features, seed=2, dtype=stored)
    exact = linear_dense_ref(x.double(), weight)
    ours, theirs = linear_dense(x, weight), linear_dense_ref(x, weight)
    assert ours.dtype is torch.float32
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    if HAS_C:
        assert torch.equal(linear_dense(x[-1:], weight), ours[-1:])
        assert torch.equal(linear_dense(x.bfloat16().float(), weight).bfloat16(), linear_dense(x.bfloat16(), weight))


def grouped(x: torch.Tensor) -> torch.Tensor:
    """`[rows, groups, 64]`, filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % 64)).view(x.shape[0], -1, 64).double().abs()


def quick_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What csrc/linear_whole.c promises, before the output is rounded: `[rows, columns]`."""
    a, b = grouped(x), grouped(weight)
    of_x = torch.einsum("rg,cg->rc", a.amax(-1) * 2.0**-13, b.sum(-1))
    of_w = torch.einsum("rg,cg->rc", a.sum(-1), b.amax(-1) * 2.0**-12)
    return 1.01 * (of_x + of_w) + torch.finfo(torch.float32).eps * x.shape[1] * (
        x.double().abs() @ weight.double().abs().T
    )


def outliers(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Numbers of very different sizes beside each other."""
    return randn(rows, columns, seed=seed, dtype=torch.float32).pow(7).bfloat16()


@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features"),
    # Several tiles, blocks of inputs, panels, tasks and passes, each with a remainder; sizes that are left to floats.
    [(24, 64, 1), (29, 640, 100), (100, 1088, 333), (769, 576, 33), (40, 100, 20), (7, 128, 20)],
)
@pytest.mark.parametrize("numbers", [randn, outliers, lambda *shape, seed: torch.full(shape, -1.9921875).bfloat16()])
def test_whole_numbers_keep_their_bound(numbers, num_tokens: int, in_features: int, out_features: int) -> None:  # type: ignore[no-untyped-def]
    x, weight = numbers(num_tokens, in_features, seed=1), numbers(out_features, in_features, seed=2)
    exact = linear_dense_ref(x.double(), weight.double())
    quick = linear_dense_quick(x, weight)
    error = (quick.double() - exact).abs()
    assert (error <= quick_bound(x, weight) + 2.0**-8 * exact.abs()).all()
    theirs = (linear_dense_ref(x, weight).double() - exact).square().mean().sqrt()
    assert error.square().mean().sqrt() <= 1.1 * theirs  # most of the error is that of storing the output


@needs_c
def test_whole_numbers_do_not_depend_on_the_rows_beside_them_or_on_threads() -> None:
    x, weight = outliers(200, 1024, seed=3), outliers(150, 1024, seed=4)
    quick = linear_dense_quick(x, weight)
    for first, count in ((0, 24), (1, 25), (95, 105), (130, 64)):
        assert torch.equal(linear_dense_quick(x[first : first + count], weight), quick[first : first + count])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear_dense_quick(x, weight), quick)
    finally:
        torch.set_num_threads(num_threads)


def test_what_is_not_finite_stays_in_its_row_and_column_of_whole_numbers() -> None:
    x, weight = randn(40, 256, seed=5), randn(50, 256, seed=6)
    clean = linear_dense_quick(x, weight)
    x[17, 100], x[20, 3], weight[9, 200] = float("nan"), float("inf"), float("-inf")
    dirty = linear_dense_quick(x, weight)
    assert not dirty[[17, 20]].isfinite().any()
    assert not dirty[:, 9].isfinite().any()
    rows, columns = [i for i in range(40) if i not in (17, 20)], [i for i in range(50) if i != 9]
    assert torch.equal(dirty[rows][:, columns], clean[rows][:, columns])
    nothing = torch.zeros(40, 256).bfloat16()
    assert not linear_dense_quick(nothing, randn(50, 256, seed=6)).any()
    assert not linear_dense_quick(randn(40, 256, seed=5), nothing).any()


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-50, 2.0**50])
def test_whole_numbers_have_any_power_of_two(scale: float) -> None:
    x, weight = randn(30, 128, seed=7), randn(20, 128, seed=8)
    expected = linear_dense_quick(x, weight).float()
    assert torch.equal(linear_dense_quick((x.float() * scale).bfloat16(), weight).float(), expected * scale)
    assert torch.equal(linear_dense_quick(x, (weight.float() * scale).bfloat16()).float(), expected * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_bfloat16_is_multiplied_in_whole_numbers(dtype: torch.dtype) -> None:
    x, weight = randn(40, 128, seed=1, dtype=dtype), randn(20, 128, seed=2)
    assert torch.equal(linear_dense_quick(x, weight), linear_dense(x, weight))
