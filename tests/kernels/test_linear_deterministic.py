from __future__ import annotations

import pytest
import torch
from c_library import needs_c

from octavo.kernels import linear_deterministic as module
from octavo.kernels.linear_deterministic import (
    gelu_and_mul_deterministic,
    gelu_and_mul_ref,
    linear_deterministic,
    linear_deterministic_ref,
    softcap_deterministic_,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_c
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features"),
    # Few rows as they lie in memory, ragged rows, and several blocks of inputs, rows, columns and passes.
    [(3, 64, 16), (33, 100, 7), (100, 2100, 70), (194, 1024, 131), (771, 40, 9), (5, 3072, 300)],
)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_with_any_threads(
    num_tokens: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    x = randn(num_tokens, in_features, dtype=dtype, seed=1)
    weight = randn(out_features, in_features, dtype=dtype, seed=2)
    bias = randn(out_features, dtype=dtype, seed=3)
    whole = linear_deterministic(x, weight)
    exact = linear_deterministic_ref(x.double(), weight.double())
    theirs = linear_deterministic_ref(x, weight)
    assert whole.dtype is dtype
    assert (whole - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert torch.equal(linear_deterministic(x, weight, bias), whole + bias)
    for first in (0, 1, 95, 96, num_tokens - 3):
        for count in (1, 2, 3, 4, 50):
            part = x[first : first + count]
            assert torch.equal(linear_deterministic(part, weight), whole[first : first + count])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear_deterministic(x, weight), whole)
    finally:
        torch.set_num_threads(num_threads)


@needs_c
def test_what_else_is_in_the_batch_reaches_no_other_row() -> None:
    x, weight = randn(33, 1100, dtype=torch.float32, seed=5), randn(20, 1100, dtype=torch.float32, seed=6)
    clean = linear_deterministic(x, weight)
    x[17] = float("nan")
    dirty = linear_deterministic(x, weight)
    assert dirty[17].isnan().all()
    assert torch.equal(dirty[:17], clean[:17])
    assert torch.equal(dirty[18:], clean[18:])


@needs_c
def test_rows_of_a_larger_tensor_and_no_rows_are_fine() -> None:
    x, weight = randn(8, 96, dtype=torch.float32, seed=7), randn(20, 64, dtype=torch.float32, seed=8)
    assert torch.equal(linear_deterministic(x[:, :64], weight), linear_deterministic(x[:, :64].contiguous(), weight))
    assert linear_deterministic(x[:0, :64], weight).shape == (0, 20)


@needs_c
def test_operands_without_a_kernel_are_refused_since_nothing_else_keeps_the_promise() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    for a, b in [(x.double(), weight.double()), (x, weight.long()), (x, weight[:, :4]), (x, torch.ones(8, 4).T)]:
        with pytest.raises(ValueError, match="two floating matrices"):
            linear_deterministic(a, b)


def test_without_the_c_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernels", lambda: None)
    assert not module.is_available()
    with pytest.raises(RuntimeError, match="install gcc or clang"):
        linear_deterministic(torch.ones(1, 4), torch.ones(2, 4))


@needs_c
@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_the_soft_cap_of_an_element_does_not_depend_on_where_it_lies(size: int) -> None:
    x = 20 * randn(5, size, dtype=torch.float32, seed=9)
    capped = softcap_deterministic_(x.clone(), 30.0)
    exact = torch.tanh(x.double() / 30) * 30
    # One ulp of the quotient before, a few of tanh and one of the product.
    torch.testing.assert_close(capped.double(), exact, rtol=1e-6, atol=0)
    for row in range(5):
        assert torch.equal(softcap_deterministic_(x[row].clone(), 30.0), capped[row])
        for column in range(size):
            one = softcap_deterministic_(x[row, column : column + 1].clone(), 30.0)
            assert torch.equal(one, capped[row, column : column + 1])


@needs_c
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exact_gelu_of_a_token_is_its_own(dtype: torch.dtype) -> None:
    gate_up = 3 * randn(9, 2 * 37, dtype=dtype, seed=10)
    ours, exact = gelu_and_mul_deterministic(gate_up), gelu_and_mul_ref(gate_up.double())
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=bound, atol=bound)
    for row in range(9):
        assert torch.equal(gelu_and_mul_deterministic(gate_up[row : row + 1]), ours[row : row + 1])
