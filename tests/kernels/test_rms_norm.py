from __future__ import annotations

import pytest
import torch

from octavo.kernels import rms_norm as module
from octavo.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (7, 80), (33, 1000), (3, 13), (200, 1024)]


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_as_exact_as_torch_and_batch_invariant(
    shape: tuple[int, int], weight_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    x, weight = randn(*shape, seed=1, dtype=dtype), randn(shape[1], seed=2, dtype=weight_dtype or dtype)
    exact = rms_norm_ref(x.double(), weight.double(), 1e-6)
    ours, theirs = rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    for row in (0, shape[0] - 1):
        assert torch.equal(ours[row : row + 1], rms_norm(x[row : row + 1], weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_normalises_the_sum_that_it_leaves(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = (
        randn(*size, seed=seed, dtype=dtype) for seed, size in ((1, shape), (2, shape), (3, shape[1:]))
    )
    kept, total = x.clone(), residual.clone()
    out = add_rms_norm(x, total, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(out, rms_norm(total, weight, 1e-5))
    assert torch.equal(x, kept)


def test_a_strided_input_gives_the_same_as_its_copy() -> None:
    x, weight = randn(5, 96, seed=1, dtype=torch.float32)[:, 16:80], randn(64, seed=2, dtype=torch.float32)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))


def test_without_the_c_library_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernels", lambda: None)
    x, weight = randn(5, 64, seed=1, dtype=torch.float32), randn(64, seed=2, dtype=torch.float32)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))
    total = x.clone()
    out = add_rms_norm(x, total, weight, 1e-6)
    assert torch.equal(total, 2 * x)
    assert torch.equal(out, rms_norm_ref(2 * x, weight, 1e-6))


def test_a_residual_that_the_kernel_cannot_write_gives_the_same() -> None:
    x, weight = randn(5, 64, seed=1, dtype=torch.float32), randn(64, seed=2, dtype=torch.float32)
    whole = randn(5, 80, seed=3, dtype=torch.float32)
    total = whole[:, :64].clone()
    out = add_rms_norm(x, total, weight, 1e-6)
    assert torch.equal(add_rms_norm(x, whole[:, :64], weight, 1e-6), out)
    assert torch.equal(whole[:, :64], total)


def test_without_anything_to_add_the_residual_is_normalised_as_it_is() -> None:
    residual, weight = randn(5, 64, seed=1, dtype=torch.float32), randn(64, seed=2, dtype=torch.float32)
    kept = residual.clone()
    assert torch.equal(add_rms_norm(None, residual, weight, 1e-6), rms_norm(kept, weight, 1e-6))
    assert torch.equal(residual, kept)
