"""Products with codes of 4 and 8 bits, in Triton's interpreter, against the weights that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ordered_dots import ordered_dots  # noqa: F401 - a fixture

from octavo.kernels.gpu import linear_quantized as module
from octavo.kernels.gpu.linear_quantized import linear_codes, linear_quantized, quantized_plan, widen
from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.kernels.weight_quantization import quantize

# The interpreter turns a loop's bounds from arrays of one element into numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def random_weight(
    out_features: int, in_features: int, *, bits: int, group_size: int, factors: str = "symmetric", **options: Any
) -> QuantizedWeight:
    """Random codes and factors; `factors` is `symmetric`, `zeros` or `offsets`."""
    rng = torch.Generator().manual_seed(out_features)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    scales = (torch.randn(out_features, groups, generator=rng) / high).half()
    return QuantizedWeight.from_codes(
        torch.randint(low, high, (out_features, in_features), generator=rng),
        scales,
        bits=bits,
        group_size=group_size,
        zeros=torch.randint(low, high, scales.shape, generator=rng).short() if factors == "zeros" else None,
        offsets=torch.randn(scales.shape, generator=rng) if factors == "offsets" else None,
        **options,
    )


def inputs(num_rows: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(9)) / in_features**0.5).to(dtype)


def assert_exact_but_for_one_rounding(out: torch.Tensor, x: torch.Tensor, weight: QuantizedWeight) -> None:
    """The codes are multiplied as they are: not even float16 rounds a weight."""
    exact = F.linear(x.double(), weight.dequantize(torch.float64))
    assert out.dtype is x.dtype and out.shape == exact.shape
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=2 * eps, atol=2e-5 + eps * 2**-8)


GROUPS = [
    *[(bits, 32, factors) for bits in (4, 8) for factors in ("symmetric", "zeros", "offsets")],
    *[(4, 64, "zeros"), (4, 96, "offsets"), (4, 128, "zeros"), (4, 128, "offsets"), (4, -1, "symmetric")],
    *[(8, 16, "zeros"), (8, 96, "symmetric"), (8, 128, "offsets"), (8, -1, "zeros")],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "group_size", "factors"), GROUPS)
def test_codes_are_multiplied_without_being_rounded(
    bits: int, group_size: int, factors: str, dtype: torch.dtype
) -> None:
    weight = random_weight(20, 136, bits=bits, group_size=group_size, factors=factors)
    x = inputs(5, 136, dtype)
    assert_exact_but_for_one_rounding(linear_codes(x, weight), x, weight)


@pytest.mark.parametrize(("bits", "group_size", "factors"), GROUPS)
def test_widened_weights_are_the_ones_they_stand_for(bits: int, group_size: int, factors: str) -> None:
    weight = random_weight(20, 136, bits=bits, group_size=group_size, factors=factors)
    wide, exact = widen(weight, torch.float32), weight.dequantize(torch.float32)
    if factors == "offsets":  # added with or without a rounding between
        torch.testing.assert_close(wide, exact, rtol=2**-22, atol=1e-6)
    else:
        assert torch.equal(wide, exact)
    assert widen(weight, torch.float16).dtype is torch.float16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 64])
def test_up_to_64_rows_are_multiplied_by_the_codes(bits: int, num_rows: int) -> None:
    weight = random_weight(33, 64, bits=bits, group_size=64)
    x = inputs(num_rows, 64, torch.float32)
    assert_exact_but_for_one_rounding(linear_codes(x, weight), x, weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_are_divided_where_processors_would_idle(bits: int) -> None:
    weight = random_weight(20, 500, bits=bits, group_size=32, factors="zeros")
    plan = quantized_plan(3, weight, processors=8)
    assert plan.split_k >= 8
    assert (plan.split_k - 1) * plan.inputs_per_split < 500 <= plan.split_k * plan.inputs_per_split
    x = inputs(3, 500, torch.float32)
    assert_exact_but_for_one_rounding(linear_codes(x, weight), x, weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_another_order_and_rows_apart_are_found(bits: int) -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    weight = random_weight(20, 96, bits=bits, group_size=32, input_order=order)
    x = inputs(6, 96, torch.float16)
    assert_exact_but_for_one_rounding(linear_quantized(x, weight, quick=True), x, weight)
    plain = random_weight(20, 96, bits=bits, group_size=32)
    assert torch.equal(linear_codes(x[::2], plain), linear_codes(x[::2].contiguous(), plain))
    assert linear_quantized(x[:0], plain, quick=True).shape == (0, 20)


@pytest.mark.usefixtures("ordered_dots")
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
def test_a_row_has_the_same_bits_in_any_batch_unless_it_must_be_quick(bits: int, group_size: int) -> None:
    weight = random_weight(20, 96, bits=bits, group_size=group_size, factors="zeros")
    x = inputs(70, 96, torch.float16)
    together = linear_quantized(x, weight)
    for rows in ([0], [69], list(range(3, 40))):
        assert torch.equal(linear_quantized(x[rows], weight), together[rows])
    among_few = linear_quantized(x[:16], weight, quick=True)
    assert torch.equal(linear_quantized(x[5:6], weight, quick=True), among_few[5:6])


@pytest.mark.parametrize(
    ("num_rows", "quick", "dtype", "by_codes"),
    [
        (1, True, torch.float16, True),
        (64, True, torch.float16, True),
        (65, True, torch.float16, False),
        (1, False, torch.float16, False),
        (1, True, torch.float32, False),
    ],
)
def test_few_quick_rows_of_16_bits_go_by_the_codes_and_others_by_wide_weights(
    num_rows: int, quick: bool, dtype: torch.dtype, by_codes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, asked = random_weight(20, 64, bits=4, group_size=32), []
    monkeypatch.setattr(module, "linear_codes", lambda *given: asked.append(given))
    x = inputs(num_rows, 64, dtype)
    out = linear_quantized(x, weight, quick=quick)
    assert bool(asked) == by_codes
    if not by_codes:
        torch.testing.assert_close(out, F.linear(x, weight.dequantize().to(dtype)), rtol=1e-2, atol=1e-3)


def test_weights_that_were_quantised_at_load_are_read() -> None:
    floating = torch.randn(40, 130, generator=torch.Generator().manual_seed(2))
    x = inputs(4, 130, torch.float32)
    for bits, group_size in ((8, 64), (4, 32)):
        weight = quantize(floating, bits=bits, group_size=group_size)
        assert_exact_but_for_one_rounding(linear_codes(x, weight), x, weight)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 60\] and the weight takes \[num_tokens, 64\]"):
        linear_quantized(torch.zeros(2, 60), random_weight(20, 64, bits=4, group_size=32))
