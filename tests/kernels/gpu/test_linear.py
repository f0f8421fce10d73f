"""Products for few rows and products with bits of their own, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ordered_dots import ordered_dots  # noqa: F401 - a fixture

from octavo.kernels.gpu import linear as module
from octavo.kernels.gpu.linear import linear, linear_deterministic, linear_skinny, skinny_plan

# The interpreter turns a loop's bounds from arrays of one element into numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def operands(
    num_rows: int, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = True, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    weight = (torch.randn(out_features, in_features, generator=generator) / in_features**0.5).to(dtype)
    return x, weight, torch.randn(out_features, generator=generator).to(dtype) if bias else None


def assert_as_exact_as_torch(
    ours: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    theirs = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    assert ours.dtype is x.dtype and ours.shape == exact.shape
    # A rounding's difference is allowed: both round once, of sums that differ in their last bits.
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features", "bias"),
    [(1, 64, 32, True), (3, 96, 70, False), (16, 40, 33, True), (2, 7, 1, True), (15, 160, 300, False)],
)
def test_few_rows_are_as_exact_as_torch(
    num_rows: int, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight, offset = operands(num_rows, in_features, out_features, dtype, bias=bias)
    assert_as_exact_as_torch(linear_skinny(x, weight, offset), x, weight, offset)


def test_inputs_are_divided_where_processors_would_idle_and_the_parts_cover_them_once() -> None:
    for out_features in (32, 64, 96, 256, 4096):
        for in_features in (8, 32, 33, 160, 512, 1000):
            plan = skinny_plan(out_features, in_features, processors=8)
            assert (plan.split_k - 1) * plan.inputs_per_split < in_features <= plan.split_k * plan.inputs_per_split
            assert plan.inputs_per_split % plan.block_k == 0
    assert skinny_plan(32, 512, processors=8).split_k == 8
    assert skinny_plan(4096, 512, processors=8).split_k == 1
    x, weight, bias = operands(5, 512, 32, torch.float32)
    assert_as_exact_as_torch(linear_skinny(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("out_features", [32, 300])
@pytest.mark.usefixtures("ordered_dots")
def test_a_row_has_the_same_bits_among_any_few(out_features: int) -> None:
    x, weight, bias = operands(16, 256, out_features, torch.float16)
    together = linear_skinny(x, weight, bias)
    for rows in ((0,), (15,), (3, 4, 9)):
        assert torch.equal(linear_skinny(x[list(rows)], weight, bias), together[list(rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features", "bias"), [(1, 64, 64, True), (65, 40, 70, False), (130, 100, 33, True)]
)
def test_the_deterministic_one_is_as_exact_as_torch(
    num_rows: int, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight, offset = operands(num_rows, in_features, out_features, dtype, bias=bias)
    assert_as_exact_as_torch(linear_deterministic(x, weight, offset), x, weight, offset)


@pytest.mark.usefixtures("ordered_dots")
def test_the_deterministic_one_gives_a_row_the_same_bits_in_any_batch() -> None:
    x, weight, bias = operands(131, 96, 70, torch.float16)
    together = linear_deterministic(x, weight, bias)
    for rows in ([0], [130], list(range(1, 18)), list(range(60, 130))):
        assert torch.equal(linear_deterministic(x[rows], weight, bias), together[rows])


def test_rows_may_lie_apart_and_there_may_be_none() -> None:
    x, weight, bias = operands(6, 64, 40, torch.float32)
    for op in (linear_skinny, linear_deterministic):
        assert torch.equal(op(x[::2], weight, bias), op(x[::2].contiguous(), weight, bias))
        assert torch.equal(
            op(x[:, :32], weight[:, :32].contiguous()), op(x[:, :32].contiguous(), weight[:, :32].contiguous())
        )
        assert torch.equal(op(x.t().contiguous().t(), weight), op(x, weight))
        assert op(x[:0], weight, bias).shape == (0, 40)


@pytest.mark.parametrize(
    ("num_rows", "dtype", "is_ours"),
    [(1, torch.float16, True), (16, torch.float16, True), (17, torch.float16, False), (4, torch.float32, False)],
)
def test_many_rows_and_wide_numbers_are_left_to_torch(
    num_rows: int, dtype: torch.dtype, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = operands(num_rows, 64, 40, dtype)
    asked = []
    monkeypatch.setattr(module, "linear_skinny", lambda *given: asked.append(given))
    out = linear(x, weight, bias)
    assert bool(asked) == is_ours
    if not is_ours:
        assert torch.equal(out, F.linear(x, weight, bias))


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight, _ = operands(2, 64, 40, torch.float32)
    for op in (linear_skinny, linear_deterministic):
        with pytest.raises(ValueError, match="must be of one dtype and fit each other"):
            op(x, weight[:, :32].contiguous())
        with pytest.raises(ValueError, match="must be of one dtype and fit each other"):
            op(x.half(), weight)
        with pytest.raises(ValueError, match="the bias is"):
            op(x, weight, torch.zeros(3))
    with pytest.raises(ValueError, match="17 rows: at most 16"):
        linear_skinny(torch.zeros(17, 64), weight)
