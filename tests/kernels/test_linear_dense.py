from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.kernels import cpu_build
from octavo.kernels import linear_dense as module
from octavo.kernels.linear_dense import linear_dense, linear_dense_ref

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
    if cpu_build.library() is not None:
        for row in range(num_tokens):
            assert torch.equal(linear_dense(x[row : row + 1], weight), ours[row : row + 1])


@pytest.mark.skipif(cpu_build.library() is None, reason="torch promises no such thing")
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


@pytest.mark.skipif(cpu_build.library() is None, reason="torch has its own")
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


@pytest.mark.skipif(cpu_build.library() is None, reason="torch raises its own error")
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
    if cpu_build.library() is not None:
        assert torch.equal(linear_dense(x[-1:], weight), ours[-1:])
        assert torch.equal(linear_dense(x.bfloat16().float(), weight).bfloat16(), linear_dense(x.bfloat16(), weight))
