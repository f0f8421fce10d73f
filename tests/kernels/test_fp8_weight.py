"""Weights in 8-bit floats: what they stand for, how far that is from the floats they were made of, how they join."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.kernels.fp8_weight import Fp8Weight, joined_scales, quantize_fp8

SIZES = [(1, 1), (128, 128), (129, 127), (5, 300), (300, 640)]


def floats(out_features: int, in_features: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(out_features)
    x = torch.randn(out_features, in_features, generator=rng, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-12, 3, x.shape, generator=rng).double())).float()


@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_a_weight_is_off_by_a_sixteenth_or_half_the_smallest_step_and_the_largest_is_448(
    out_features: int, in_features: int, by_block: bool
) -> None:
    x = floats(out_features, in_features)
    weight = quantize_fp8(x, by_block=by_block)
    assert weight.shape == (out_features, in_features)
    assert weight.scales.shape == ((-(-out_features // 128), -(-in_features // 128)) if by_block else (out_features, 1))
    scales = replace(weight, codes=torch.ones_like(x).to(torch.float8_e4m3fn)).dequantize(torch.float64)
    # 4 significant bits: half a step is 2^-4 of a power of two below; under 2^-6 steps are 2^-9. And one division.
    bound = torch.maximum(2**-4 * x.double().abs(), 2**-10 * scales) * (1 + 2**-20)
    assert ((weight.dequantize(torch.float64) - x.double()).abs() <= bound).all()
    assert weight.codes.float().abs().amax() == 448


@pytest.mark.parametrize("by_block", [True, False])
def test_each_weight_is_its_code_times_the_scale_of_its_block_or_output(by_block: bool) -> None:
    weight = quantize_fp8(floats(300, 200), by_block=by_block)
    wide = weight.dequantize(torch.float64)
    for out, column in ((0, 0), (127, 127), (128, 128), (299, 199), (255, 130)):
        scale = weight.scales[out // 128, column // 128] if by_block else weight.scales[out, 0]
        assert wide[out, column] == weight.codes[out, column].double() * scale.double()
    assert torch.equal(weight.with_scale_per_row().dequantize(), weight.dequantize())
    assert not quantize_fp8(torch.zeros(3, 4), by_block=by_block).dequantize().any()


@pytest.mark.parametrize("outs", [(128, 256, 70), (64, 200, 128), (128, 3)])
@pytest.mark.parametrize("by_block", [True, False])
def test_weights_behind_each_other_are_the_same_weights(outs: tuple[int, ...], by_block: bool) -> None:
    parts = [quantize_fp8(floats(out, 200), by_block=by_block) for out in outs]
    joined = joined_scales(parts)
    assert joined is not None
    assert joined.rows_per_scale == (128 if by_block and outs[0] % 128 == 0 else 1)
    whole = replace(joined, codes=torch.cat([part.codes.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn))
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_what_scales_its_inputs_in_another_way_stays_apart() -> None:
    by_block, by_row = (quantize_fp8(floats(128, 256), by_block=each) for each in (True, False))
    static, other = (replace(by_row, input_scale=torch.tensor([scale])) for scale in (0.5, 0.25))

    def joins(*parts: Fp8Weight) -> bool:
        return joined_scales(parts) is not None

    assert not joins(by_block, by_row)
    assert not joins(static, other) and not joins(static, by_row) and not joins(by_row, static)
    assert joins(static, static, static) and joins(by_block, by_block)
    assert not joins(by_row, quantize_fp8(floats(128, 200), by_block=False))
