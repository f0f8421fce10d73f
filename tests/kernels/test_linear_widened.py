"""Quantised weights as floats of 16 bits, beside what they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from c_library import needs_c

from octavo.kernels import linear_widened as module
from octavo.kernels.linear_quantized import linear_quantized, linear_quantized_ref
from octavo.kernels.linear_widened import linear_widened
from octavo.kernels.quantized_weight import QuantizedWeight

CASES = [
    *[(bits, 32, factors) for bits in (4, 8) for factors in ("symmetric", "zeros", "offsets", "superblocks")],
    *[(bits, group, "zeros") for bits in (4, 8) for group in (64, 96, 128, 2048, -1)],
    (8, 16, "zeros"),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(out_features: int, in_features: int, *, bits: int, group_size: int, factors: str) -> QuantizedWeight:
    rng = generator(0)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    num_groups = 1 if group_size == -1 else -(-in_features // group_size)
    shape: tuple[int, ...] = (out_features, num_groups)
    options: dict[str, Any] = {}
    if factors == "zeros":
        options["zeros"] = torch.randint(low, high, shape, generator=rng).short()
    if factors == "offsets":
        options["offsets"] = torch.randn(shape, generator=rng)
    weight = QuantizedWeight.from_codes(
        torch.randint(low, high, (out_features, in_features), generator=rng),
        (torch.randn(shape, generator=rng) * 0.1).half(),
        bits=bits,
        group_size=group_size,
        **options,
    )
    if factors != "superblocks":
        return weight
    if bits == 4:  # eight rows beside each other, as in gguf_blocks.py
        shape = (-(-out_features // 8), num_groups, 8)
    return QuantizedWeight(
        weight.codes,
        torch.randint(-100, 100, shape, generator=rng).to(torch.int8),
        *(None, torch.randint(0, 60, shape, generator=rng).to(torch.int8)),
        *(bits, group_size, in_features),
        superblock_scales=torch.rand(out_features, num_groups // 8, 2, generator=rng).half() * 0.01,
    )


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size", "factors"), CASES)
@pytest.mark.parametrize("in_features", [256, 1000, 2304])
def test_the_weights_are_the_exact_ones_rounded_once(
    bits: int, group_size: int, factors: str, in_features: int, dtype: torch.dtype
) -> None:
    if factors == "superblocks":
        in_features = -(-in_features // 256) * 256
    weight = random_weight(37, in_features, bits=bits, group_size=group_size, factors=factors)
    taken_out = linear_widened(torch.eye(in_features).to(dtype), weight).T
    exact = weight.dequantize()
    if "offsets" in factors or factors == "superblocks":  # the C kernel rounds once before, torch twice
        assert torch.allclose(taken_out.float(), exact, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-5)
    else:
        assert torch.equal(taken_out, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size", "factors"), CASES)
def test_products_are_within_what_rounding_moves_weights_and_twice_as_far_as_torchs_at_most(
    bits: int, group_size: int, factors: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WIDENED_AT_ONCE", 16)  # several parts, and some rows over
    weight = random_weight(37, 2304, bits=bits, group_size=group_size, factors=factors)
    x = torch.randn(33, 2304, generator=generator(2)).to(dtype)
    exact = linear_quantized_ref(x.double(), weight)
    ours, theirs = linear_widened(x, weight).double(), linear_quantized_ref(x, weight).double()
    half_step = torch.finfo(dtype).eps / 2
    magnitude = x.double().abs() @ weight.dequantize(torch.float64).abs().T
    assert ((ours - exact).abs() <= half_step * (1.01 * magnitude + 2 * exact.abs())).all()
    assert (ours - exact).square().mean().sqrt() <= 2 * (theirs - exact).square().mean().sqrt()


def test_inputs_in_another_order_mean_the_same_products() -> None:
    order = torch.randperm(128, generator=generator(3))
    plain = random_weight(16, 128, bits=4, group_size=32, factors="zeros")
    codes = plain.unpacked()
    ordered = QuantizedWeight.from_codes(
        codes, plain.scales, bits=4, group_size=32, zeros=plain.zeros, input_order=order
    )
    x = torch.randn(40, 128, generator=generator(4)).bfloat16()
    assert torch.equal(linear_widened(x, ordered), linear_widened(x[:, order], plain))


@needs_c
def test_parts_are_multiplied_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDENED_AT_ONCE", 16)
    weight = random_weight(37, 256, bits=8, group_size=32, factors="symmetric")
    x = torch.randn(40, 256, generator=generator(6)).bfloat16()
    parts: list[torch.Tensor] = []

    def doubled(x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        parts.append(part.clone())
        return 2 * F.linear(x, part)

    assert torch.equal(linear_widened(x, weight, doubled), 2 * linear_widened(x, weight))
    assert torch.equal(torch.cat(parts), weight.dequantize().bfloat16())


@needs_c
def test_threads_change_no_weight() -> None:
    weight = random_weight(1050, 320, bits=4, group_size=32, factors="zeros")
    x = torch.eye(320).bfloat16()
    ours, before = linear_widened(x, weight), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear_widened(x, weight), ours)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused() -> None:
    weight = random_weight(4, 64, bits=4, group_size=32, factors="symmetric")
    for x in (torch.zeros(2, 63).bfloat16(), torch.zeros(64).bfloat16(), torch.zeros(2, 64)):
        with pytest.raises(ValueError, match="must be"):
            linear_widened(x, weight)


def test_without_the_library_it_is_the_other_way_of_multiplying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernels", lambda: None)
    weight = random_weight(37, 256, bits=8, group_size=32, factors="zeros")
    x = torch.randn(40, 256, generator=generator(5)).bfloat16()
    assert torch.equal(linear_widened(x, weight), linear_quantized(x, weight))
