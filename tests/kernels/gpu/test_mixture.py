"""The products over grouped tokens and their sum, in Triton's interpreter, against their meaning in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ordered_dots import ordered_dots  # noqa: F401 - a fixture
from tiny_models import save_tiny_model

from octavo.kernels import mixture as kernels
from octavo.kernels.clamped_swiglu import ClampedSwiGLU
from octavo.kernels.expert_stack import ExpertStack
from octavo.kernels.gated_activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.gpu import mixture_tiles
from octavo.kernels.gpu.expert_groups import route
from octavo.kernels.gpu.mixture import mixture
from octavo.kernels.gpu.mixture_tiles import tiles_for
from octavo.kernels.mixture import mixture_ref
from octavo.models.registry import load_model

# The interpreter turns a loop's bounds from arrays of one element into numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

CLAMPED = ClampedSwiGLU(alpha=1.3, limit=1.5)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_stack(
    num_experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    *,
    act: Any = silu_and_mul,
    bias: bool = False,
    first: int = 0,
) -> ExpertStack:
    return ExpertStack(
        w13=(randn(num_experts, 2 * inner, hidden, seed=1) / hidden**0.5).to(dtype),
        w2=(randn(num_experts, hidden, inner, seed=2) / inner**0.5).to(dtype),
        b13=randn(num_experts, 2 * inner, seed=3, dtype=dtype) if bias else None,
        b2=randn(num_experts, hidden, seed=4, dtype=dtype) if bias else None,
        first=first,
        act=act,
    )


def double(stack: ExpertStack) -> ExpertStack:
    b13, b2 = (None if bias is None else bias.double() for bias in (stack.b13, stack.b2))
    return ExpertStack(stack.w13.double(), stack.w2.double(), b13, b2, stack.first, stack.act)


def assert_as_exact_as_its_meaning(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: ExpertStack
) -> None:
    exact = mixture_ref(x.double(), weights, chosen, double(stack))
    theirs, ours = mixture_ref(x, weights, chosen, stack), mixture(x, weights, chosen, stack)
    assert ours.dtype is x.dtype and ours.shape == x.shape
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "num_chosen", "num_experts", "hidden", "inner", "act", "bias"),
    [
        (1, 2, 4, 64, 32, silu_and_mul, False),
        (1, 4, 4, 40, 24, CLAMPED, True),
        (5, 2, 4, 72, 20, gelu_tanh_and_mul, False),
        (23, 2, 3, 33, 40, CLAMPED, True),
        (40, 1, 2, 32, 16, silu_and_mul, False),
    ],
)
def test_the_mixture_is_as_exact_as_its_meaning(
    num_tokens: int,
    num_chosen: int,
    num_experts: int,
    hidden: int,
    inner: int,
    act: Any,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    stack = make_stack(num_experts, hidden, inner, dtype, act=act, bias=bias)
    x = randn(num_tokens, hidden, seed=5, dtype=dtype)
    weights, chosen = route(randn(num_tokens, num_experts, seed=6), num_chosen)
    assert_as_exact_as_its_meaning(x, weights, chosen, stack)


def test_experts_of_other_ranks_and_padding_say_nothing() -> None:
    stack = make_stack(2, 32, 16, torch.float32, first=3, act=CLAMPED, bias=True)
    x = randn(6, 32, seed=5)
    chosen = torch.tensor([[3, 0], [4, 3], [-1, -1], [5, 2], [0, 4], [1, 1]], dtype=torch.int32)
    weights = randn(6, 2, seed=6).abs()
    assert_as_exact_as_its_meaning(x, weights, chosen, stack)
    out = mixture(x, weights, chosen, stack)
    assert not out[[2, 3, 5]].any() and out[[0, 1, 4]].any(dim=1).all()
    assert not mixture(x[2:3], weights[2:3], chosen[2:3], stack).any()
    assert torch.equal(mixture(x[1:2], weights[1:2], chosen[1:2], stack), out[1:2])


def test_parts_of_the_experts_add_up_to_all() -> None:
    whole = make_stack(5, 32, 16, torch.float32, act=CLAMPED, bias=True)
    x = randn(9, 32, seed=5)
    weights, chosen = route(randn(9, 5, seed=6), 3)
    parts = []
    for first, end in ((0, 2), (2, 5)):
        held = slice(first, end)
        assert whole.b13 is not None and whole.b2 is not None
        stack = ExpertStack(whole.w13[held], whole.w2[held], whole.b13[held], whole.b2[held], first, CLAMPED)
        parts.append(mixture(x, weights, chosen, stack))
    torch.testing.assert_close(parts[0] + parts[1], mixture(x, weights, chosen, whole), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("ordered_dots")
def test_a_token_has_the_same_bits_in_any_batch() -> None:
    stack = make_stack(3, 40, 24, torch.float16, act=CLAMPED, bias=True)
    x = randn(24, 40, seed=5, dtype=torch.float16)
    weights, chosen = route(randn(24, 3, seed=6), 2)
    together = mixture(x, weights, chosen, stack, batch_invariant=True)
    for rows in ([0], [23], [7, 3], list(range(4, 21))):
        alone = mixture(x[rows], weights[rows], chosen[rows], stack, batch_invariant=True)
        assert torch.equal(alone, together[rows])


def test_the_same_tiles_are_taken_for_any_number_of_pairs_where_bits_are_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixture_tiles, "is_interpreted", lambda: False)
    of_sizes = [tiles_for(num_pairs, 128, 2, batch_invariant=True) for num_pairs in (8, 1000, 65536)]
    assert of_sizes[0] == of_sizes[1] == of_sizes[2]
    assert [tiles_for(n, 128, 2, batch_invariant=False).block_m for n in (8, 512, 2048, 8192, 65536)] == [
        *(16, 16, 32, 64, 128)
    ]


def test_there_may_be_no_token_and_rows_may_lie_apart() -> None:
    stack = make_stack(3, 32, 16, torch.float32)
    x = randn(8, 32, seed=5)
    weights, chosen = route(randn(8, 3, seed=6), 2)
    assert mixture(x[:0], weights[:0], chosen[:0], stack).shape == (0, 32)
    apart = mixture(x[::2], weights[::2], chosen[::2], stack)
    assert torch.equal(apart, mixture(x[::2].contiguous(), weights[::2].contiguous(), chosen[::2].contiguous(), stack))


def test_operands_that_do_not_fit_are_refused() -> None:
    stack = make_stack(3, 32, 16, torch.float32)
    weights, chosen = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="must be of one dtype"):
        mixture(torch.zeros(2, 32, dtype=torch.float16), weights, chosen, stack)
    with pytest.raises(ValueError, match="must be of one dtype and fit"):
        mixture(torch.zeros(2, 30), weights, chosen, stack)
    with pytest.raises(ValueError, match="are for 3 tokens"):
        mixture(torch.zeros(3, 32), weights, chosen, stack)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_a_model_s_mixture_sent_to_the_gpu_s_kernels_says_what_the_cpu_says(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(model_type, tmp_path, seed=4, num_hidden_layers=1, hidden_size=32, intermediate_size=48)
    model: Any = load_model(tmp_path, dtype="float32", model_impl="native")
    block, x = model.layers[0].mlp, randn(7, 32, seed=8)
    with torch.inference_mode():
        on_cpu = block.forward(x)
        asked: list[str] = []

        def route_here(*given: Any, **options: Any) -> Any:
            asked.append("route")
            return route(*given, **options)

        def mixture_here(x: torch.Tensor, weights: torch.Tensor, *given: Any, **options: Any) -> Any:
            asked.append("mixture")
            return mixture(x, weights, *given, **options)

        monkeypatch.setattr(kernels, "route", route_here)
        monkeypatch.setattr(kernels, "mixture", mixture_here)
        block.stack_experts()
        torch.testing.assert_close(block.forward(x), on_cpu, atol=1e-5, rtol=1e-5)
    assert asked == ["route", "mixture"]
