"""The gated activations' kernel against its meaning."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from octavo.kernels.gated_activation import gelu_tanh_and_mul_ref, silu_and_mul_ref
from octavo.kernels.gpu import gated_activation as gpu

Activation = Callable[[torch.Tensor], torch.Tensor]
PAIRS = [(gpu.silu_and_mul, silu_and_mul_ref), (gpu.gelu_tanh_and_mul, gelu_tanh_and_mul_ref)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 80), (2, 1025)])
def test_it_is_as_exact_as_torch_and_batch_invariant(
    shape: tuple[int, int], dtype: torch.dtype, ours: Activation, theirs: Activation
) -> None:
    x = (torch.randn(shape[0], 2 * shape[1], generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    exact = theirs(x.double())
    got = ours(x)
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (theirs(x) - exact).abs().max() + 1e-7
    assert torch.equal(ours(x[-1:]), got[-1:])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_extreme_gates_saturate(ours: Activation, theirs: Activation) -> None:
    x = torch.tensor([[-50.0, -20.0, -0.0, 0.0, 30.0, 200.0, 1e-30, math.inf, *[1.0] * 8]])
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


def test_a_strided_input_gives_the_same_as_its_copy_and_no_tokens_are_no_work() -> None:
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))[:, 10:74]
    assert torch.equal(gpu.silu_and_mul(x), gpu.silu_and_mul(x.contiguous()))
    assert gpu.gelu_tanh_and_mul(x[:0]).shape == (0, 32)


def test_what_the_kernel_is_not_written_for_is_left_to_torch() -> None:
    assert gpu.can(torch.zeros(2, 8))
    assert not gpu.can(torch.zeros(2, 7))
    assert not gpu.can(torch.zeros(2, 8, dtype=torch.float64))
    assert not gpu.can(torch.zeros(8, 2).T)
    assert not gpu.can(torch.zeros(2, 2, 8))
