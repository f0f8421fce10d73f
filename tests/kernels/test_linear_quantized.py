from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from octavo.kernels import cpu_build
from octavo.kernels import linear_quantized as module
from octavo.kernels.linear_quantized import (
    QuantizedWeight,
    concatenate,
    linear_quantized,
    linear_quantized_ref,
    quantize,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

needs_library = pytest.mark.skipif(cpu_build.library() is None, reason="there is no C library")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(
    out_features: int, in_features: int, *, bits: int, group_size: int, factors: str, seed: int = 0, **options: Any
) -> QuantizedWeight:
    """Random codes; `factors` is `symmetric`, `zeros` or `offsets`, or the dtype of symmetric scales."""
    rng = generator(seed)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    scales = torch.randn(out_features, groups, generator=rng).to(DTYPES.get(factors, torch.float16))
    return QuantizedWeight.from_codes(
        torch.randint(low, high, (out_features, in_features), generator=rng),
        scales,
        bits=bits,
        group_size=group_size,
        zeros=torch.randint(low, high, scales.shape, generator=rng).short() if factors == "zeros" else None,
        offsets=torch.randn(scales.shape, generator=rng) if factors == "offsets" else None,
        **options,
    )


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
    elif cpu_build.library() is None:
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


def test_the_meaning_is_a_scale_for_each_group_and_a_zero_point_or_an_offset() -> None:
    codes = torch.randint(0, 16, (2, 64), generator=generator(1))
    scales, zeros = torch.tensor([[0.5, 2.0], [1.0, 0.25]]), torch.tensor([[1, 2], [3, 16]], dtype=torch.int16)
    for factor, given in (({}, 8.0), ({"zeros": zeros}, None)):
        weight = QuantizedWeight.from_codes(codes, scales, bits=4, group_size=32, **factor)
        for row in range(2):
            for column in range(64):
                zero = float(zeros[row, column // 32]) if given is None else given
                expected = float(scales[row, column // 32]) * (float(codes[row, column]) - zero)
                assert float(weight.dequantize()[row, column]) == expected
    with_offsets = QuantizedWeight.from_codes(codes, scales, bits=4, group_size=32, offsets=-scales)
    assert torch.equal(with_offsets.dequantize(), scales.repeat_interleave(32, 1) * (codes - 1))


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


@needs_library
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


@needs_library
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


@needs_library
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 32), (8, 64)])
@pytest.mark.parametrize("in_features", [64, 1000])
def test_quantising_moves_a_weight_by_at_most_half_a_step_and_is_the_same_without_the_library(
    in_features: int, bits: int, group_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (torch.randn(33, in_features, generator=generator(5)) * 0.03).to(dtype)
    weight[3], weight[4, :32] = 0.0, 0.01
    quantized = quantize(weight, bits=bits, group_size=group_size)
    step = quantized.scales.float().abs().repeat_interleave(group_size, dim=1)[:, :in_features]
    moved = (quantized.dequantize() - weight.float()).abs()
    # With 4 bits there is no +8: what is nearest to it moves by more.
    signed_step = quantized.scales.float().repeat_interleave(group_size, dim=1)[:, :in_features]
    clipped = weight.float() / signed_step > 7.5
    limit = torch.where(clipped & (bits == 4), 1.0, 0.5) * step * 1.04
    assert (moved <= limit).all()
    assert quantized.unpacked()[3].float().sub(8 if bits == 4 else 0).count_nonzero() == 0
    monkeypatch.setattr(module, "_kernels", lambda: None)
    in_torch = quantize(weight, bits=bits, group_size=group_size)
    assert torch.equal(in_torch.codes, quantized.codes)
    assert torch.equal(in_torch.scales, quantized.scales)


def test_weights_that_are_not_finite_are_not_quantised(path: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        weight = torch.zeros(4, 64)
        weight[2, 40] = value
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight, bits=4, group_size=32)


def test_parts_of_one_kind_become_one_and_others_stay_apart() -> None:
    first, second = (random_weight(16, 64, bits=4, group_size=32, factors="zeros", seed=seed) for seed in (1, 2))
    joined = concatenate([first, second])
    assert isinstance(joined, QuantizedWeight)
    assert torch.equal(joined.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    x = torch.randn(2, 64, generator=generator(6))
    assert torch.equal(
        linear_quantized(x, joined), torch.cat([linear_quantized(x, first), linear_quantized(x, second)], 1)
    )
    ordered = random_weight(16, 64, bits=4, group_size=32, factors="zeros", input_order=torch.arange(64).flip(0))
    other_kinds = (
        ordered,
        torch.zeros(16, 64),
        random_weight(16, 64, bits=8, group_size=32, factors="zeros"),
        random_weight(16, 64, bits=4, group_size=64, factors="zeros"),
        random_weight(16, 64, bits=4, group_size=32, factors="symmetric"),
    )
    for other in other_kinds:
        assert concatenate([first, other]) == (first, other)
    dense = concatenate([torch.zeros(2, 4), torch.ones(3, 4)])
    assert isinstance(dense, torch.Tensor)
    assert dense.shape == (5, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 3}, "bits=3"),
        ({"group_size": 48}, "group_size=48"),
        ({"group_size": 0}, "group_size=0"),
        ({"codes": torch.full((2, 64), 16)}, "codes of 4 bits"),
        ({"codes": torch.full((2, 64), -1)}, "codes of 4 bits"),
        ({"codes": torch.zeros(0, 64)}, "codes of 4 bits"),
        ({"scales": torch.ones(2, 3)}, "scales are"),
        ({"scales": torch.ones(2, 2, dtype=torch.float64)}, "scales are"),
        ({"zeros": torch.ones(2, 2)}, "zeros are"),
        ({"zeros": torch.ones(2, 2).short(), "offsets": torch.ones(2, 2)}, "not both"),
        ({"input_order": torch.zeros(64, dtype=torch.int64)}, "each input once"),
        ({"input_order": torch.arange(63)}, "each input once"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    fields = {"codes": torch.zeros(2, 64, dtype=torch.int64), "scales": torch.ones(2, 2), "bits": 4, "group_size": 32}
    with pytest.raises(ValueError, match=says):
        QuantizedWeight.from_codes(**{**fields, **changes})  # type: ignore[arg-type]  # wrong values are the point


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


def test_parts_behind_each_other_stay_on_their_device() -> None:
    weight = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), bits=4, group_size=32)
    joined = concatenate([weight.to(torch.device("meta"))] * 2)
    assert isinstance(joined, QuantizedWeight)
    assert joined.codes.device.type == joined.scales.device.type == "meta"
    assert joined.shape == (16, 64)
