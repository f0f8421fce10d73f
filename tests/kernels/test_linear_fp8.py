"""What a product of 8-bit floats means, and how far it is from one of inputs that are not rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from octavo.kernels.fp8_weight import Fp8Weight, quantize_fp8
from octavo.kernels.linear_fp8 import linear_fp8, linear_fp8_ref, multiplies_fp8, round_inputs_ref


def inputs(num_rows: int, in_features: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, in_features, generator=rng)
    return x * torch.exp2(torch.randint(-14, 4, x.shape, generator=rng).float())


def most_error(x: torch.Tensor, group_size: int, input_scale: torch.Tensor | None) -> torch.Tensor:
    """How far e4m3 may move each input: 2^-4 of it, or below the smallest normal code half a step, 2^-10 of the scale;
    and a rounding of the division in float32."""
    _, scales = round_inputs_ref(x, group_size, input_scale)
    of_each = scales.T.repeat_interleave(group_size, dim=1)[:, : x.shape[1]].double()
    return torch.maximum(2**-4 * x.double().abs(), 2**-10 * of_each) * (1 + 2**-20)


@pytest.mark.parametrize("group_size", [128, 300])
@pytest.mark.parametrize("is_static", [True, False])
def test_an_input_is_off_by_no_more_than_half_a_step(group_size: int, is_static: bool) -> None:
    x = inputs(5, 300)
    scale = x.abs().amax().view(1) / 448 if is_static else None
    codes, scales = round_inputs_ref(x, group_size, scale)
    assert codes.shape == (5, 300) and scales.shape == (-(-300 // group_size), 5)
    rounded = codes.double() * scales.T.repeat_interleave(group_size, dim=1)[:, :300].double()
    assert ((rounded - x.double()).abs() <= most_error(x, group_size, scale)).all()
    if not is_static:
        assert codes.float().abs().amax(1).tolist() == [448.0] * 5  # the whole range is made use of


@pytest.mark.parametrize("kind", ["blocks", "rows", "static"])
def test_a_product_is_off_by_what_its_inputs_are_and_no_more(kind: str) -> None:
    x = inputs(7, 300)
    rng = torch.Generator().manual_seed(3)
    weight = quantize_fp8(torch.randn(40, 300, generator=rng), by_block=kind == "blocks")
    if kind == "static":
        weight = replace(weight, input_scale=x.abs().amax().view(1) / 448)
    wide = weight.dequantize(torch.float64)
    exact, rounded = F.linear(x.double(), wide), linear_fp8_ref(x.double(), weight)
    bound = F.linear(most_error(x, weight.group_size, weight.input_scale), wide.abs())
    assert ((rounded - exact).abs() <= bound * (1 + 2**-40)).all()
    assert (rounded - exact).abs().max() > 0  # they are rounded
    assert linear_fp8(x.half(), weight).dtype is torch.float16
    # Sums in float32, in any order (Higham 2002, section 3.1).
    sums = 304 * 2**-24 * F.linear(x.double().abs() * (1 + 2**-4), wide.abs())
    assert ((linear_fp8(x, weight).double() - rounded).abs() <= sums).all()


def test_each_group_of_a_token_has_a_scale_of_its_own() -> None:
    """A large input does not take the small ones of another group, or of another token, with it."""
    small = 448 * 2.0**-20
    x = torch.full((2, 256), small)
    x[0, 3] = 448.0
    weight = Fp8Weight(torch.ones(1, 256).to(torch.float8_e4m3fn), torch.ones(1, 2), 128, 128)
    assert linear_fp8_ref(x.double(), weight).tolist() == [[448 + 128 * small], [256 * small]]
    whole = replace(weight, scales=torch.ones(1, 1), group_size=256)
    assert linear_fp8_ref(x.double(), whole).tolist() == [[448.0], [256 * small]]


def test_only_newer_gpus_multiply_them_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not multiplies_fp8(torch.device("cpu"))
    for capability, can in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        assert multiplies_fp8(torch.device("cuda")) == can


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 60\] and the weight takes \[num_tokens, 64\]"):
        linear_fp8(torch.zeros(2, 60), quantize_fp8(torch.ones(3, 64), by_block=False))
