"""Inputs rounded to e4m3 in Triton's interpreter, bit for bit as in torch."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.gpu.round_inputs import round_inputs
from octavo.kernels.linear_fp8 import round_inputs_ref


def assert_same(x: torch.Tensor, group_size: int, input_scale: torch.Tensor | None = None) -> None:
    codes, scales = round_inputs(x, group_size, input_scale)
    expected_codes, expected_scales = round_inputs_ref(x, group_size, input_scale)
    assert codes.dtype is torch.float8_e4m3fn and codes.is_contiguous() and scales.is_contiguous()
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)


def inputs(num_rows: int, in_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of magnitudes from far below a group's smallest normal code to its largest."""
    rng = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, in_features, generator=rng)
    return (x * torch.exp2(torch.randint(-14, 4, x.shape, generator=rng).float())).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "in_features"), [(1, 128), (1, 7), (3, 256), (5, 300), (17, 129), (2, 4100), (40, 384)]
)
@pytest.mark.parametrize("by_group", [True, False])
def test_each_group_is_rounded_as_in_torch(num_rows: int, in_features: int, by_group: bool, dtype: torch.dtype) -> None:
    assert_same(inputs(num_rows, in_features, dtype), 128 if by_group else in_features)


@pytest.mark.parametrize(("num_rows", "in_features"), [(1, 128), (1, 7), (5, 300), (33, 129)])
def test_a_scale_of_all_inputs_is_kept_to_and_what_is_beyond_it_saturates(num_rows: int, in_features: int) -> None:
    x = inputs(num_rows, in_features)
    scale = x.abs().max().view(1) / 1000
    assert_same(x, in_features, scale)
    assert round_inputs(x, in_features, scale)[0].float().abs().max() == 448


@pytest.mark.parametrize("group_size", [128, 256])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_group_that_is_not_finite_has_nan_for_its_scale_and_others_have_their_own(
    bad: float, group_size: int
) -> None:
    x = inputs(3, 256)
    x[1, 5] = bad
    assert_same(x, group_size)
    _, scales = round_inputs(x, group_size)
    assert scales.isnan().nonzero().tolist() == [[0, 1]]


def test_nan_is_kept_beside_a_scale_of_all_inputs() -> None:
    x = inputs(3, 256)
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    codes, _ = round_inputs(x, 256, torch.tensor([0.5]))
    assert codes.float().isnan().nonzero().tolist() == [[1, 5]]
    assert codes[2, 6].float() == 448


def test_zeros_have_a_scale_and_stay_zeros() -> None:
    x = inputs(2, 256)
    x[0] = 0.0
    for group_size in (128, 256):
        assert_same(x, group_size)
        codes, scales = round_inputs(x, group_size)
        assert not codes[0].float().any() and (scales > 0).all()


def test_rows_may_lie_apart_and_there_may_be_none() -> None:
    x = inputs(6, 512)
    for group_size in (128, 300):
        assert_same(x[::2, :300], group_size)
        assert_same(x.t().contiguous().t()[:, :300], group_size)
        codes, scales = round_inputs(x[:0, :300], group_size)
        assert codes.shape == (0, 300) and scales.shape[1] == 0
