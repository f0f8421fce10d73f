from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from octavo.kernels import gated_activation
from octavo.kernels.gated_activation import (
    gelu_tanh_and_mul,
    gelu_tanh_and_mul_ref,
    silu_and_mul,
    silu_and_mul_ref,
)

Op = Callable[[torch.Tensor], torch.Tensor]
OPS = [(silu_and_mul, silu_and_mul_ref), (gelu_tanh_and_mul, gelu_tanh_and_mul_ref)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 10), (33, 1000)])
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_it_is_as_exact_as_torch_and_batch_invariant(
    op: Op, reference: Op, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = (4 * torch.randn(shape[0], 2 * shape[1], generator=torch.Generator().manual_seed(3))).to(dtype)
    exact = reference(x.double())
    ours, theirs = op(x), reference(x)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert torch.equal(op(x[-1:]), ours[-1:])


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_gates_at_the_ends_of_the_range_saturate(op: Op, reference: Op) -> None:
    gates = torch.tensor([-1e4, -200.0, -100.0, -90.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 90.0, 200.0, 1e4])
    x = torch.cat((gates, torch.ones_like(gates)))[None]
    torch.testing.assert_close(op(x), reference(x), rtol=1e-5, atol=1e-33)  # e^x is cut off at e^88


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_without_the_c_library_torch_answers(op: Op, reference: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_activation, "_kernels", lambda: None)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    assert torch.equal(op(x), reference(x))
