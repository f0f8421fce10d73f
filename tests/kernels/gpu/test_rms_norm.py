"""The RMS norm kernel against its meaning, over shapes, dtypes and strides."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.gpu import rms_norm as gpu
from octavo.kernels.rms_norm import rms_norm_ref

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 64), (7, 80), (3, 1000), (5, 1), (2, 2049)]


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_exact_as_torch_and_batch_invariant(
    shape: tuple[int, int], weight_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    x, weight = randn(*shape, seed=1, dtype=dtype), randn(shape[1], seed=2, dtype=weight_dtype or dtype)
    exact = rms_norm_ref(x.double(), weight.double(), 1e-6)
    ours, theirs = gpu.rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-7
    for row in (0, shape[0] - 1):
        assert torch.equal(ours[row : row + 1], gpu.rms_norm(x[row : row + 1], weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_residual_it_normalises_the_rounded_sum_that_it_leaves(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, residual, weight = (
        randn(*size, seed=seed, dtype=dtype) for seed, size in ((1, shape), (2, shape), (3, shape[1:]))
    )
    kept, total = x.clone(), residual.clone()
    out = gpu.add_rms_norm(x, total, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(out, gpu.rms_norm(total, weight, 1e-5))
    assert torch.equal(x, kept)


def test_strided_inputs_give_the_same_as_their_copies() -> None:
    x = randn(5, 96, seed=1, dtype=torch.float32)[:, 16:80]
    residual = randn(5, 100, seed=3, dtype=torch.float32)[:, 7:71]
    weight = randn(64, seed=2, dtype=torch.float32)
    assert torch.equal(gpu.rms_norm(x, weight, 1e-6), gpu.rms_norm(x.contiguous(), weight, 1e-6))
    copy = residual.clone()
    ours, theirs = gpu.add_rms_norm(x, residual, weight, 1e-6), gpu.add_rms_norm(x.contiguous(), copy, weight, 1e-6)
    assert torch.equal(ours, theirs)
    assert torch.equal(residual, copy)


def test_what_lies_beside_the_residual_stays() -> None:
    x, whole, weight = torch.ones(3, 64), torch.full((3, 80), 7.0), torch.ones(64)
    gpu.add_rms_norm(x, whole[:, :64], weight, 1e-6)
    assert set(whole[:, :64].unique().tolist()) == {8.0}
    assert set(whole[:, 64:].unique().tolist()) == {7.0}


def test_no_tokens_are_no_work() -> None:
    assert gpu.add_rms_norm(torch.zeros(0, 8), torch.zeros(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


def test_what_the_kernel_is_not_written_for_is_left_to_torch() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    assert gpu.can(x, None, weight)
    assert gpu.can(x, x, weight.half())
    assert not gpu.can(x.double(), None, weight.double())
    assert not gpu.can(torch.zeros(8, 2).T, None, weight)
    assert not gpu.can(x, x.half(), weight)
    assert not gpu.can(x, None, torch.ones(16)[::2])
    assert not gpu.can(torch.zeros(2, 0), None, torch.ones(0))
