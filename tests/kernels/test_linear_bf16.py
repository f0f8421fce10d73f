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


def test_other_dtypes_and_a_missing_library_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(3, 32, seed=1), randn(8, 32, seed=2)
    assert torch.equal(linear_bf16(x.float(), weight.float()), F.linear(x.float(), weight.float()))
    monkeypatch.setattr(module, "_kernels", lambda: None)
    assert torch.equal(linear_bf16(x, weight), F.linear(x, weight))


@pytest.mark.skipif(cpu_build.library() is None, reason="torch raises its own error")
def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="features"):
        linear_bf16(randn(3, 32, seed=1), randn(8, 31, seed=2))
