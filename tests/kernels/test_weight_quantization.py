from __future__ import annotations

import pytest
import torch
from c_library import needs_c
from quantized_weights import generator

from octavo.kernels import weight_quantization as module
from octavo.kernels.weight_quantization import quantize


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


@pytest.mark.parametrize("with_c", [pytest.param(True, marks=needs_c), False])
def test_weights_that_are_not_finite_are_not_quantised(with_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_c:
        monkeypatch.setattr(module, "_kernels", lambda: None)
    for value in (float("nan"), float("inf"), -float("inf")):
        weight = torch.zeros(4, 64)
        weight[2, 40] = value
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight, bits=4, group_size=32)
