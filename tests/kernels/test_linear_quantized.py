from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from c_library import HAS_C, needs_c
from quantized_weights import generator, random_weight

from octavo.kernels import linear_quantized as module
from octavo.kernels.linear_quantized import linear_quantized, linear_quantized_ref

CASES = [
    *[(bits, 32, factors) for bits in (4, 8) for factors in ("symmetric", "zeros", "offsets", "bfloat16", "float32")],
    *[(bits, group, "zeros") for bits in (4, 8) for group in (64, 96, 128, 2048, -1)],
    (8, 16, "zeros"),
]


@pytest.fixture(params=["c", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways: with the C library and without."""
    if request.param == "torch":
        monkeypatch.setattr(module, "_kernels", lambda: None)
    elif not HAS_C:
        pytest.skip("there is no C library")
    yield request.param


@pytest.mark.parametrize(("bits", "group_size", "factors"), CASES)
@pytest.mark.parametrize("in_features", [128, 1000, 2112])
def test_the_weights_it_multiplies_by_are_the_exact_ones(
    bits: int, group_size: int, factors: str, in_features: int, path: str
) -> None:
    weight = random_weight(37, in_features, bits=bits, group_size=group_size, factors=factors)
    taken_out = linear_quantized(torch.eye(in_features), weight).T
    exact = weight.dequantize(torch.float64)
    if factors == "offsets":  # the C kernel rounds once, torch twice
        assert torch.allclose(taken_out.double(), exact, rtol=2**-22, atol=1e-5)
    else:
        assert torch.equal(taken_out, exact.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size", "factors"), CASES)
def test_it_is_as_exact_as_torch_and_batch_invariant(
    bits: int, group_size: int, factors: str, dtype: torch.dtype, path: str
) -> None:
    weight = random_weight(37, 2112, bits=bits, group_size=group_size, factors=factors)
    x = torch.randn(9, 2112, generator=generator(2)).to(dtype)
    exact = linear_quantized_ref(x.double(), weight)
    ours, theirs = linear_quantized(x, weight), linear_quantized_ref(x, weight)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    if path == "c":
        for row in range(9):
            assert torch.equal(linear_quantized(x[row : row + 1], weight), ours[row : row + 1])


@needs_c
@pytest.mark.parametrize("num_tokens", [97, 800])
@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_are_the_same_bits_as_one_whatever_the_number_of_threads(bits: int, num_tokens: int) -> None:
    weight = random_weight(301, 320, bits=bits, group_size=32, factors="symmetric")
    x = torch.randn(num_tokens, 320, generator=generator(2)).bfloat16()
    ours, before = linear_quantized(x, weight), torch.get_num_threads()
    for row in (0, 95, 96, num_tokens - 1):
        assert torch.equal(linear_quantized(x[row : row + 1], weight), ours[row : row + 1])
    try:
        torch.set_num_threads(2)
        assert torch.equal(linear_quantized(x, weight), ours)
        assert torch.equal(linear_quantized(x[:1], weight, quick=True), linear_quantized(x[:2], weight, quick=True)[:1])
        many = linear_quantized(x, weight, quick=True)
        torch.set_num_threads(1)
        assert torch.equal(linear_quantized(x, weight, quick=True), many)
        assert torch.equal(linear_quantized(x[-9:], weight, quick=True), many[-9:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size", "factors"), CASES)
def test_the_quick_way_is_within_its_bound_and_the_same_for_a_few_rows_and_for_more(
    bits: int, group_size: int, factors: str, dtype: torch.dtype
) -> None:
    weight = random_weight(37, 2112, bits=bits, group_size=group_size, factors=factors)
    # Inputs of very different sizes side by side: the small ones lose bits.
    x = (
        torch.randn(13, 2112, generator=generator(2))
        * torch.logspace(-5, 0, 2112)[torch.randperm(2112, generator=generator(3))]
    ).to(dtype)
    exact = linear_quantized_ref(x.double(), weight)
    largest = x.double().view(13, -1, 32).abs().amax(-1).repeat_interleave(32, dim=1)
    wide = weight.dequantize(torch.float64).abs().T
    # Codes and zero points are multiplied apart: the rounding is of these products, not of their difference.
    magnitude = weight.scales.double().abs().repeat_interleave(2112 // weight.scales.shape[1] + 1, dim=1)[:, :2112]
    rounding = 2112 * 2**-24 * (x.double().abs() @ (wide + 256 * magnitude.T))
    moved = 1.0001 / 254 if bits == 4 else 2**-15
    bound = moved * (largest @ wide) + rounding + exact.abs() * torch.finfo(dtype).eps
    few = 8 if bits == 8 and group_size != 16 else 4
    ours = [linear_quantized(x[:num_tokens], weight, quick=True) for num_tokens in range(1, 14)]
    for several in ours:
        assert ((several - exact[: len(several)]).abs() <= bound[: len(several)]).all()
        assert torch.equal(several, ours[few - 1 if len(several) <= few else 12][: len(several)])


@needs_c
def test_the_quick_way_loses_nothing_where_inputs_are_of_one_size_and_shows_what_is_not_finite() -> None:
    weight = random_weight(16, 64, bits=4, group_size=32, factors="float32")
    x = torch.randint(-127, 128, (1, 64), generator=generator(2)).bfloat16()
    x[0, ::32] = 127.0  # of 8 bits, as beside codes of 4 bits, the scale is the largest over 127
    exact = linear_quantized_ref(x.double(), weight)
    assert torch.allclose(linear_quantized(x, weight, quick=True).double(), exact, rtol=2**-7)
    assert linear_quantized(torch.zeros(1, 64).bfloat16(), weight, quick=True).count_nonzero() == 0
    for value in (float("nan"), float("inf")):
        x[0, 3] = value
        assert linear_quantized(x, weight, quick=True).isnan().all()
        many = linear_quantized(torch.cat((x, torch.ones(9, 64).bfloat16())), weight, quick=True)
        assert not many[0].isfinite().any()
        assert many[1:].isfinite().all()
    tiny = torch.full((1, 64), 2.0**-133).bfloat16()
    assert linear_quantized(tiny, weight, quick=True).isfinite().all()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_rows_give_no_rows(bits: int, dtype: torch.dtype, quick: bool, path: str) -> None:
    weight = random_weight(37, 128, bits=bits, group_size=32, factors="symmetric")
    out = linear_quantized(torch.empty(0, 128, dtype=dtype), weight, quick=quick)
    assert (out.shape, out.dtype) == ((0, 37), dtype)


@needs_c
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("in_features", [1040, 1056])
def test_padding_of_several_groups_has_no_factors_left_over_from_another_row(
    in_features: int, num_tokens: int, quick: bool
) -> None:
    """Groups of 16, of which the last 64 inputs have one or two: zeros times what lies there must not become NaN."""
    weight = random_weight(8, in_features, bits=8, group_size=16, factors="float32")
    weight.scales[4:] = torch.inf  # read just before the last inputs of the rows that are compared
    x = torch.randn(num_tokens, in_features, generator=generator(2)).bfloat16()
    ours = linear_quantized(x, weight, quick=quick)[:, :4]
    assert torch.allclose(ours.float(), linear_quantized_ref(x, weight)[:, :4].float(), rtol=2**-7, atol=0.5)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_another_order_mean_the_same_products(bits: int, path: str) -> None:
    order = torch.randperm(128, generator=generator(3))
    plain = random_weight(16, 128, bits=bits, group_size=32, factors="zeros")
    ordered = random_weight(16, 128, bits=bits, group_size=32, factors="zeros", input_order=order)
    assert torch.equal(ordered.dequantize()[:, order], plain.dequantize())
    x = torch.randn(3, 128, generator=generator(4))
    assert torch.equal(linear_quantized(x, ordered), linear_quantized(x[:, order], plain))


def test_inputs_of_another_width_are_refused() -> None:
    weight = random_weight(4, 64, bits=4, group_size=32, factors="symmetric")
    for x in (torch.zeros(2, 63), torch.zeros(64)):
        with pytest.raises(ValueError, match="takes"):
            linear_quantized(x, weight)


def test_float64_and_the_memory_it_takes() -> None:
    weight = random_weight(16, 128, bits=4, group_size=32, factors="bfloat16")
    x = torch.randn(2, 128, generator=generator(7)).double()
    assert torch.equal(linear_quantized(x, weight), F.linear(x, weight.dequantize(torch.float64)))
    assert weight.shape == (16, 128)
    assert weight.num_bytes == 16 * 128 // 2 + 16 * 4 * 2
