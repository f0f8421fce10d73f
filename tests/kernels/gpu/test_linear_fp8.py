"""Products with weights of 8-bit floats, in Triton's interpreter, against what they mean in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ordered_dots import ordered_dots  # noqa: F401 - a fixture

from octavo.kernels.fp8_weight import Fp8Weight, quantize_fp8
from octavo.kernels.gpu import linear_fp8 as module
from octavo.kernels.gpu.linear_fp8 import LARGE, SMALL, WIDE, TilePlan, linear_fp8, linear_fp8_tiles, tile_plan
from octavo.kernels.gpu.linear_fp8_skinny import MOST_ROWS, linear_fp8_skinny, skinny_plan
from octavo.kernels.linear_fp8 import linear_fp8_ref

# [num_rows, in_features, out_features]: ragged ones, and tiles that are just full, or just not.
SHAPES = [(1, 128, 64), (3, 7, 5), (65, 256, 129), (64, 384, 128), (130, 300, 70), (2, 129, 257), (7, 640, 1)]
KINDS = ["blocks", "blocks cut", "rows", "static"]


def make_weight(out_features: int, in_features: int, kind: str) -> Fp8Weight:
    rng = torch.Generator().manual_seed(out_features)
    floating = torch.randn(out_features + 40, in_features, generator=rng) / in_features**0.5
    floating *= torch.exp2(torch.randint(-3, 4, (out_features + 40, 1), generator=rng).float())
    if kind == "blocks cut":  # a rank's outputs that begin within a block
        whole = quantize_fp8(floating, by_block=True).with_scale_per_row()
        return replace(whole, codes=whole.codes[40:].contiguous(), scales=whole.scales[40:].contiguous())
    weight = quantize_fp8(floating[40:], by_block=kind == "blocks")
    return replace(weight, input_scale=torch.tensor([3 / 448])) if kind == "static" else weight


def inputs(num_rows: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(9)).to(dtype)


def assert_sums_in_float32(out: torch.Tensor, exact: torch.Tensor, magnitudes: torch.Tensor, terms: int) -> None:
    """Within the bound of a sum of so many products in float32, each scaled, in any order (Higham 2002, section 3.1),
    and one rounding at the end."""
    eps = torch.finfo(out.dtype).eps
    bound = (terms + 4) * 2**-24 * 1.01 * magnitudes + eps / 2 * exact.abs() * 1.01 + torch.finfo(out.dtype).tiny
    assert ((out.double() - exact).abs() <= bound).all()


def assert_means_the_same(out: torch.Tensor, x: torch.Tensor, weight: Fp8Weight) -> None:
    exact = linear_fp8_ref(x.double(), weight)
    positive = replace(weight, codes=weight.codes.float().abs().to(torch.float8_e4m3fn))
    assert out.dtype is x.dtype and out.shape == exact.shape
    assert_sums_in_float32(out, exact, linear_fp8_ref(x.double().abs(), positive), x.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "in_features", "out_features"), SHAPES)
def test_tiles_are_what_rounded_inputs_mean(
    num_rows: int, in_features: int, out_features: int, kind: str, dtype: torch.dtype
) -> None:
    weight, x = make_weight(out_features, in_features, kind), inputs(num_rows, in_features, dtype)
    assert_means_the_same(linear_fp8_tiles(x, weight), x, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_large_tiles_are_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_processors", lambda _device: 1)
    weight, x = make_weight(129, 300, kind), inputs(131, 300, torch.float32)
    assert tile_plan(131, weight, 1, quick=True) is (SMALL if kind == "blocks cut" else LARGE)
    assert_means_the_same(linear_fp8_tiles(x, weight, quick=True), x, weight)


@pytest.mark.parametrize("kind", ["rows", "static", "one block wide"])
def test_wide_tiles_are_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_processors", lambda _device: 1)
    in_features = 100 if kind == "one block wide" else 300
    weight = make_weight(512, in_features, "blocks" if kind == "one block wide" else kind)
    x = inputs(131, in_features, torch.float32)
    assert tile_plan(131, weight, 1, quick=True) is WIDE
    assert_means_the_same(linear_fp8_tiles(x, weight, quick=True), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "in_features", "out_features"), [*SHAPES[:2], *SHAPES[5:], (17, 300, 70)])
def test_few_rows_are_multiplied_by_the_very_weights_without_being_rounded(
    num_rows: int, in_features: int, out_features: int, kind: str, dtype: torch.dtype
) -> None:
    weight, x = make_weight(out_features, in_features, kind), inputs(num_rows, in_features, dtype)
    wide = weight.dequantize(torch.float64)
    exact, magnitudes = F.linear(x.double(), wide), F.linear(x.double().abs(), wide.abs())
    out = linear_fp8_skinny(x, weight)
    assert out.dtype is dtype and out.shape == exact.shape
    assert_sums_in_float32(out, exact, magnitudes, in_features)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_divided_where_processors_would_idle(kind: str) -> None:
    plan = skinny_plan(3, 20, 1100, processors=8)
    assert plan.split_k >= 4
    assert (plan.split_k - 1) * plan.inputs_per_split < 1100 <= plan.split_k * plan.inputs_per_split
    weight, x = make_weight(20, 1100, kind), inputs(3, 1100, torch.float32)
    wide = weight.dequantize(torch.float64)
    exact, magnitudes = F.linear(x.double(), wide), F.linear(x.double().abs(), wide.abs())
    assert_sums_in_float32(linear_fp8_skinny(x, weight), exact, magnitudes, 1100)


@pytest.mark.usefixtures("ordered_dots")
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_batch_unless_it_must_be_quick(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "num_processors", lambda _device: 1)  # large tiles would do for any number of rows
    weight, x = make_weight(130, 300, kind), inputs(131, 300, torch.float16)
    together = linear_fp8(x, weight)
    for rows in ([0], [130], list(range(3, 40)), list(range(60, 130))):
        assert torch.equal(linear_fp8(x[rows], weight), together[rows])
    among_few = linear_fp8(x[:16], weight, quick=True)
    assert torch.equal(linear_fp8(x[5:6], weight, quick=True), among_few[5:6])


@pytest.mark.parametrize("kind", ["blocks", "blocks cut", "rows"])  # the interpreter reads a code that is NaN as 480
def test_a_row_that_is_not_finite_leaves_the_others_alone(kind: str) -> None:
    weight, x = make_weight(70, 300, kind), inputs(66, 300, torch.float32)
    whole = linear_fp8(x, weight)
    x[1, 200] = float("nan")
    out = linear_fp8(x, weight)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, *range(2, 66)]], whole[[0, *range(2, 66)]])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_lie_apart_and_there_may_be_none(kind: str) -> None:
    weight, x = make_weight(20, 256, kind), inputs(6, 512, torch.float16)
    for quick in (True, False):
        assert torch.equal(
            linear_fp8(x[::2, :256], weight, quick=quick), linear_fp8(x[::2, :256].contiguous(), weight, quick=quick)
        )
        turned = x[:, :256].t().contiguous().t()
        assert torch.equal(linear_fp8(turned, weight, quick=quick), linear_fp8(x[:, :256], weight, quick=quick))
        assert linear_fp8(x[:0, :256], weight, quick=quick).shape == (0, 20)


@pytest.mark.parametrize(
    ("num_rows", "quick", "dtype", "is_skinny"),
    [
        (1, True, torch.float16, True),
        (64, True, torch.float16, True),
        (65, True, torch.float16, False),
        (1, False, torch.float16, False),
        (1, True, torch.float32, False),
    ],
)
def test_few_quick_rows_of_16_bits_are_not_rounded_and_others_are(
    num_rows: int, quick: bool, dtype: torch.dtype, is_skinny: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(module, "linear_fp8_skinny", lambda *given: asked.append(given))
    linear_fp8(inputs(num_rows, 128, dtype), make_weight(20, 128, "rows"), quick=quick)
    assert bool(asked) == is_skinny


def sized(out_features: int, *, rows_per_scale: int = 128, num_groups: int = 2) -> Fp8Weight:
    """A weight of such a size that has no contents."""
    scales = torch.empty(-(-out_features // rows_per_scale), num_groups, device="meta")
    codes = torch.empty(out_features, 256, dtype=torch.float8_e4m3fn, device="meta")
    return Fp8Weight(codes, scales, rows_per_scale, 256 // num_groups)


def test_tiles_are_large_where_they_fill_the_processors_and_the_number_of_rows_may_count() -> None:
    assert tile_plan(2048, sized(4096), 132, quick=True) is LARGE
    assert tile_plan(128, sized(4096), 132, quick=True) is SMALL
    assert tile_plan(2048, sized(4096), 132, quick=False) is SMALL
    assert tile_plan(2048, sized(4096, rows_per_scale=1), 132, quick=True) is SMALL
    of_rows, ragged = (sized(size, rows_per_scale=1, num_groups=1) for size in (4096, 4224))
    assert tile_plan(2048, of_rows, 132, quick=True) is WIDE
    assert tile_plan(640, of_rows, 132, quick=True) is LARGE
    assert tile_plan(2048, ragged, 132, quick=True) is LARGE
    assert tile_plan(2048, of_rows, 132, quick=False) is SMALL


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("most_rows", [65, 100, 300, 2000, 8192])
def test_powers_of_two_and_the_most_rows_which_warm_up_tries_meet_every_plan(most_rows: int, num_groups: int) -> None:
    tried = [count for count in (1 << power for power in range(14)) if MOST_ROWS < count < most_rows] + [most_rows]
    all_counts = [*range(MOST_ROWS + 1, most_rows, 64), most_rows]  # every number of tiles is among them
    for out_features in [*range(64, 8192, 448), *range(8192, 40_000, 2944), 151_936]:
        weight = sized(out_features, num_groups=num_groups)

        def plans(counts: Iterable[int], weight: Fp8Weight = weight) -> list[TilePlan]:
            return list(dict.fromkeys(tile_plan(count, weight, 132, quick=True) for count in counts))

        assert len(plans(tried)) == len(plans(all_counts)), out_features


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 60\] and the weight takes \[num_tokens, 64\]"):
        linear_fp8(torch.zeros(2, 60), make_weight(20, 64, "rows"))
