from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_weights import generator, random_weight

from octavo.kernels.linear_quantized import linear_quantized
from octavo.kernels.quantized_weight import QuantizedWeight, concatenate
from octavo.kernels.weight_quantization import quantize


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


def test_parts_behind_each_other_stay_on_their_device() -> None:
    weight = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), bits=4, group_size=32)
    joined = concatenate([weight.to(torch.device("meta"))] * 2)
    assert isinstance(joined, QuantizedWeight)
    assert joined.codes.device.type == joined.scales.device.type == "meta"
    assert joined.shape == (16, 64)
