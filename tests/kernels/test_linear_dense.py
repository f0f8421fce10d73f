from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.kernels import cpu_build
from octavo.kernels import linear_bf16 as module
from octavo.kernels.linear_bf16 import linear_bf16, linear_bf16_ref


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 33])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 16), (1024, 100), (100, 7), (13, 1)])
def test_it_is_as_exact_as_torch_and_batch_invariant(num_tokens: int, in_features: int, out_features: int) -> None:
    x, weight = randn(num_tokens, in_features, seed=1), randn(out_features, in_features, seed=2)
    exact = linear_bf16_ref(x.double(), weight.double())
    ours, theirs = linear_bf16(x, weight), linear_bf16_ref(x, weight)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    if cpu_build.library() is not None:
        for row in range(num_tokens):
            assert torch.equal(linear_bf16(x[row : row + 1], weight), ours[row : row + 1])


@pytest.mark.skipif(cpu_build.library() is None, reason="torch promises no such thing")
@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features"),
    # Several blocks of inputs, of rows, of columns and of passes, each with a remainder.
    [(100, 2100, 70), (194, 1024, 131), (770, 40, 36), (771, 1032, 9), (5, 3072, 300)],
)
def test_blocks_and_threads_change_no_bit(num_tokens: int, in_features: int, out_features: int) -> None:
    x, weight = randn(num_tokens, in_features, seed=3), randn(out_features, in_features, seed=4)
    exact = linear_bf16_ref(x.double(), weight.double())
    ours, theirs = linear_bf16(x, weight), linear_bf16_ref(x, weight)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    for first in (0, 1, 95, 96, num_tokens - 3):
        for count in (1, 2, 3, 4, 50):
            part = x[first : first + count]
            assert torch.equal(linear_bf16(part, weight), ours[first : first + count])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear_bf16(x, weight), ours)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.skipif(cpu_build.library() is None, reason="torch has its own")
def test_a_nan_stays_in_its_row_and_nothing_gives_zero() -> None:
    x, weight = randn(33, 1100, seed=5), randn(20, 1100, seed=6)
    clean = linear_bf16(x, weight)
    x[17, 1050] = float("nan")
    dirty = linear_bf16(x, weight)
    assert dirty[17].isnan().all()
    assert torch.equal(dirty[:17], clean[:17])
    assert torch.equal(dirty[18:], clean[18:])
    assert linear_bf16(x[:0], weight).shape == (0, 20)
    assert not linear_bf16(torch.zeros(2, 0).bfloat16(), torch.zeros(20, 0).bfloat16()).any()


def test_other_dtypes_and_a_missing_library_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(3, 32, seed=1), randn(8, 32, seed=2)
    assert torch.equal(linear_bf16(x.float(), weight.float()), F.linear(x.float(), weight.float()))
    monkeypatch.setattr(module, "_kernels", lambda: None)
    assert torch.equal(linear_bf16(x, weight), F.linear(x, weight))


@pytest.mark.skipif(cpu_build.library() is None, reason="torch raises its own error")
def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="features"):
        linear_bf16(randn(3, 32, seed=1), randn(8, 31, seed=2))
