"""Matrices of all experts as codes, against the weights that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.kernels.expert_codes import MOST_EXPONENT, ExpertCodes, coded
from octavo.kernels.expert_stack import CodedExpertStack
from octavo.kernels.gated_activation import silu_and_mul
from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.kernels.weight_quantization import quantize
from octavo.models.quantization.mxfp4 import dequantize


def random_weight(
    seed: int, out_features: int, in_features: int, *, bits: int, group_size: int, zeros: bool = False, **options: Any
) -> QuantizedWeight:
    rng = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    scales = torch.randn(out_features, 1 if group_size == -1 else -(-in_features // group_size), generator=rng).half()
    return QuantizedWeight.from_codes(
        torch.randint(low, high, (out_features, in_features), generator=rng),
        scales,
        bits=bits,
        group_size=group_size,
        zeros=torch.randint(low, high, scales.shape, generator=rng).short() if zeros else None,
        **options,
    )


@pytest.mark.parametrize("in_features", [32, 96, 128, 130, 256])
def test_mxfp4_stands_for_what_the_checkpoint_s_bytes_do(in_features: int) -> None:
    rng = torch.Generator().manual_seed(in_features)
    groups = -(-in_features // 32)
    blocks = torch.randint(0, 256, (3, 20, groups, 16), generator=rng).to(torch.uint8)
    exponents = torch.randint(0, MOST_EXPONENT + 1, (3, 20, groups), generator=rng).to(torch.uint8)
    codes = ExpertCodes.from_mxfp4(zip(blocks, exponents, strict=True), num_experts=3, in_features=in_features)
    assert codes.shape == (3, 20, in_features)
    for expert in range(3):
        meant = dequantize(blocks[expert], exponents[expert])[:, :in_features]
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(codes.dequantize(expert, dtype), meant.to(dtype))
    num_units = -(-in_features // 128)
    assert codes.num_bytes == 3 * 20 * num_units * (64 + 4), "4.25 bits a weight"


@pytest.mark.parametrize(
    ("bits", "group_size", "in_features", "zeros"),
    [
        (4, 32, 96, False),
        (4, 64, 200, True),
        (4, -1, 100, True),
        (8, 32, 40, False),
        (8, 96, 128, True),
        (8, -1, 72, True),
    ],
)
def test_integers_stand_for_what_each_expert_s_do(bits: int, group_size: int, in_features: int, zeros: bool) -> None:
    weights = [random_weight(seed, 20, in_features, bits=bits, group_size=group_size, zeros=zeros) for seed in range(3)]
    codes = coded(weights)
    assert codes is not None and codes.shape == (3, 20, in_features)
    for expert, weight in enumerate(weights):
        assert torch.equal(codes.dequantize(expert), weight.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_an_expert_without_zeros_among_others_has_the_plain_one(bits: int) -> None:
    weights = [random_weight(seed, 8, 64, bits=bits, group_size=32, zeros=bool(seed % 2)) for seed in range(3)]
    codes = coded(weights)
    assert codes is not None
    for expert, weight in enumerate(weights):
        assert torch.equal(codes.dequantize(expert), weight.dequantize())


def test_what_is_quantised_at_load_takes_half_or_a_third_of_16_bits() -> None:
    floating = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(1))
    for bits, group_size, of_weight in ((8, 64, 8.25), (4, 32, 4.5)):
        codes = coded([quantize(weight, bits=bits, group_size=group_size) for weight in floating])
        assert codes is not None and codes.num_bytes == floating.numel() * of_weight / 8


def test_what_cannot_lie_so_is_left() -> None:
    one = random_weight(0, 8, 64, bits=4, group_size=32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    offsets = QuantizedWeight.from_codes(
        one.unpacked(), one.scales, bits=4, group_size=32, offsets=torch.zeros_like(one.scales)
    )
    for others in (
        [one, torch.zeros(8, 64)],
        [one, random_weight(1, 8, 64, bits=4, group_size=64)],
        [one, random_weight(1, 8, 64, bits=8, group_size=32)],
        [random_weight(1, 8, 64, bits=8, group_size=16)],
        [random_weight(1, 8, 64, bits=4, group_size=32, input_order=order)],
        [offsets],
    ):
        assert coded(others) is None
    assert coded([one, one]) is not None


def test_stacks_that_do_not_fit_together_are_refused() -> None:
    w13, w2 = (coded([random_weight(0, *shape, bits=8, group_size=32)]) for shape in ((64, 24), (24, 40)))
    assert w13 is not None and w2 is not None
    with pytest.raises(ValueError, match=r"w13 is \[1, 64, 24\] and w2 \[1, 24, 40\]: they do not fit each other"):
        CodedExpertStack(w13, w2, None, None, 0, silu_and_mul)


def test_the_experts_of_gpt_oss_120b_take_62_gb() -> None:
    num_bytes = 0
    for out_features in (2 * 2880, 2880):
        blocks = torch.empty(out_features, 90, 16, dtype=torch.uint8, device="meta")
        parts = [(blocks, torch.empty(out_features, 90, dtype=torch.uint8, device="meta"))]
        num_bytes += ExpertCodes.from_mxfp4(parts, num_experts=1, in_features=2880).num_bytes
    assert 36 * 128 * num_bytes == pytest.approx(62.3e9, rel=1e-3)
