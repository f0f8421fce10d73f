"""Mixtures whose experts stay codes, in Triton's interpreter, against the weights that the codes stand for."""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from mxfp4_checkpoints import save_mxfp4_model
from ordered_dots import ordered_dots  # noqa: F401 - a fixture
from paged_runner import run_paged
from tiny_models import random_token_ids, save_tiny_model

from octavo.kernels import mixture as kernels
from octavo.kernels.clamped_swiglu import ClampedSwiGLU
from octavo.kernels.expert_codes import MOST_EXPONENT, ExpertCodes, coded
from octavo.kernels.expert_stack import CodedExpertStack, ExpertStack
from octavo.kernels.gated_activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.gpu import mixture_tiles
from octavo.kernels.gpu.expert_groups import route
from octavo.kernels.gpu.mixture import mixture
from octavo.kernels.gpu.mixture_codes import _bfloat16_bits, _bfloat16_power_bits
from octavo.kernels.gpu.mixture_tiles import code_tiles_for
from octavo.kernels.mixture import mixture_ref
from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.models.quantization.mxfp4 import MXFP4Reader
from octavo.models.registry import load_model

CLAMPED = ClampedSwiGLU(alpha=1.3, limit=1.5)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mxfp4(seed: int, num_experts: int, out_features: int, in_features: int) -> ExpertCodes:
    rng = torch.Generator().manual_seed(seed)
    groups = -(-in_features // 32)
    blocks = torch.randint(0, 256, (num_experts, out_features, groups, 16), generator=rng).to(torch.uint8)
    exponents = torch.randint(119, 123, (num_experts, out_features, groups), generator=rng).to(torch.uint8)
    return ExpertCodes.from_mxfp4(zip(blocks, exponents, strict=True), num_experts=num_experts, in_features=in_features)


def integers(
    seed: int, num_experts: int, out_features: int, in_features: int, *, bits: int, group_size: int, zeros: bool
) -> ExpertCodes:
    rng = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    groups = 1 if group_size == -1 else -(-in_features // group_size)

    def one() -> QuantizedWeight:
        scales = (torch.rand(out_features, groups, generator=rng) / high / in_features**0.5).to(torch.bfloat16)
        return QuantizedWeight.from_codes(
            torch.randint(low, high, (out_features, in_features), generator=rng),
            scales,
            bits=bits,
            group_size=group_size,
            zeros=torch.randint(low // 2, high // 2, scales.shape, generator=rng).short() if zeros else None,
        )

    made = coded([one() for _ in range(num_experts)])
    assert made is not None
    return made


FORMATS: dict[str, Any] = {
    "mxfp4": mxfp4,
    **{
        f"int{bits} by {group_size}{' with zeros' if zeros else ''}": (
            lambda *sizes, bits=bits, group_size=group_size, zeros=zeros: integers(
                *sizes, bits=bits, group_size=group_size, zeros=zeros
            )
        )
        for bits, group_size, zeros in (
            *((4, 32, False), (4, 64, True), (4, 128, True), (4, -1, False)),
            *((8, 64, False), (8, 32, True), (8, -1, True)),
        )
    },
}


def make_stack(
    kind: str,
    num_experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    *,
    act: Any = silu_and_mul,
    bias: bool = False,
    first: int = 0,
) -> CodedExpertStack:
    return CodedExpertStack(
        w13=FORMATS[kind](1, num_experts, 2 * inner, hidden),
        w2=FORMATS[kind](2, num_experts, hidden, inner),
        b13=randn(num_experts, 2 * inner, seed=3, dtype=dtype) if bias else None,
        b2=randn(num_experts, hidden, seed=4, dtype=dtype) if bias else None,
        first=first,
        act=act,
    )


def dequantised(stack: CodedExpertStack, dtype: torch.dtype) -> ExpertStack:
    """What the experts were before they stayed codes: each weight rounded to `dtype`."""
    matrices = [stack.matrices(expert, dtype) for expert in range(stack.w2.shape[0])]
    w13, w2 = (torch.stack(of_all) for of_all in zip(*matrices, strict=True))
    b13, b2 = (None if bias is None else bias.to(dtype) for bias in (stack.b13, stack.b2))
    return ExpertStack(w13, w2, b13, b2, stack.first, stack.act)


def assert_as_exact_as_dequantised(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: CodedExpertStack
) -> None:
    exact = mixture_ref(x.double(), weights, chosen, dequantised(stack, torch.float64))
    theirs = mixture_ref(x, weights, chosen, dequantised(stack, x.dtype))
    ours = mixture(x, weights, chosen, stack)
    assert ours.dtype is x.dtype and ours.shape == x.shape
    most = 4 if x.dtype is torch.bfloat16 else 2  # the interpreter does not round to bfloat16, it cuts off
    assert (ours - exact).abs().max() <= most * (theirs - exact).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_codes_of_every_kind_are_as_exact_as_dequantised_experts(kind: str, dtype: torch.dtype) -> None:
    stack = make_stack(kind, 3, 160, 40, dtype, act=CLAMPED, bias=True)
    x = randn(7, 160, seed=5, dtype=dtype)
    weights, chosen = route(randn(7, 3, seed=6), 2)
    assert_as_exact_as_dequantised(x, weights, chosen, stack)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*[("mxfp4", dtype) for dtype in DTYPES], ("int4 by 32", torch.float16), ("int8 by 64", torch.float16)],
)
@pytest.mark.parametrize(
    ("num_tokens", "num_chosen", "num_experts", "hidden", "inner", "act", "bias"),
    [
        (1, 2, 4, 64, 32, silu_and_mul, False),
        (1, 4, 4, 40, 24, CLAMPED, True),
        (5, 2, 6, 136, 20, gelu_tanh_and_mul, False),  # experts that nobody goes to
        (16, 1, 1, 128, 16, silu_and_mul, False),  # blocks, units and tiles that are full
        (17, 1, 1, 129, 17, CLAMPED, True),  # and begun
        (40, 1, 2, 32, 130, silu_and_mul, False),
    ],
)
def test_a_mixture_of_any_size_is_as_exact_as_of_dequantised_experts(
    kind: str,
    num_tokens: int,
    num_chosen: int,
    num_experts: int,
    hidden: int,
    inner: int,
    act: Any,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    stack = make_stack(kind, num_experts, hidden, inner, dtype, act=act, bias=bias)
    x = randn(num_tokens, hidden, seed=5, dtype=dtype)
    weights, chosen = route(randn(num_tokens, num_experts, seed=6), num_chosen)
    assert_as_exact_as_dequantised(x, weights, chosen, stack)


def test_one_expert_may_have_all_tokens_and_others_none() -> None:
    stack = make_stack("mxfp4", 5, 64, 32, torch.float32)
    x, weights = randn(35, 64, seed=5), torch.ones(35, 1)
    for expert in (0, 3, 4):
        assert_as_exact_as_dequantised(x, weights, torch.full((35, 1), expert, dtype=torch.int32), stack)


def test_experts_of_other_ranks_and_padding_say_nothing() -> None:
    stack = make_stack("mxfp4", 2, 32, 16, torch.float32, first=3, act=CLAMPED, bias=True)
    x = randn(6, 32, seed=5)
    chosen = torch.tensor([[3, 0], [4, 3], [-1, -1], [5, 2], [0, 4], [1, 1]], dtype=torch.int32)
    weights = randn(6, 2, seed=6).abs()
    assert_as_exact_as_dequantised(x, weights, chosen, stack)
    out = mixture(x, weights, chosen, stack)
    assert not out[[2, 3, 5]].any() and out[[0, 1, 4]].any(dim=1).all()
    assert torch.equal(mixture(x[1:2], weights[1:2], chosen[1:2], stack), out[1:2])


@pytest.mark.usefixtures("ordered_dots")
@pytest.mark.parametrize("kind", ["mxfp4", "int4 by 64 with zeros", "int8 by 32 with zeros"])
def test_a_token_has_the_same_bits_in_any_batch(kind: str) -> None:
    stack = make_stack(kind, 3, 40, 24, torch.float16, act=CLAMPED, bias=True)
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
    assert len({code_tiles_for(n, 128, 2, batch_invariant=True) for n in (8, 1000, 65536)}) == 1
    of_sizes = [code_tiles_for(n, 128, 2, batch_invariant=False).block_m for n in (8, 512, 2048, 8192, 65536)]
    assert of_sizes == [16, 16, 32, 64, 128]
    assert all(tiles.up[0] % 64 == tiles.down[0] % 64 == 0 for tiles in mixture_tiles.CODE_TILES.values())


def test_there_may_be_no_token_and_rows_may_lie_apart() -> None:
    stack = make_stack("mxfp4", 3, 32, 16, torch.float32)
    x = randn(8, 32, seed=5)
    weights, chosen = route(randn(8, 3, seed=6), 2)
    assert mixture(x[:0], weights[:0], chosen[:0], stack).shape == (0, 32)
    apart = mixture(x[::2], weights[::2], chosen[::2], stack)
    assert torch.equal(apart, mixture(x[::2].contiguous(), weights[::2].contiguous(), chosen[::2].contiguous(), stack))


def test_operands_that_do_not_fit_are_refused() -> None:
    stack = make_stack("mxfp4", 3, 32, 16, torch.float32)
    weights, chosen = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="must be of one dtype and fit"):
        mixture(torch.zeros(2, 30), weights, chosen, stack)
    with pytest.raises(ValueError, match="are for 3 tokens"):
        mixture(torch.zeros(3, 32), weights, chosen, stack)


@triton.jit
def _power_bits_kernel(exponents_ptr, powers_ptr, BLOCK_N: tl.constexpr):
    outs = tl.arange(0, BLOCK_N)
    exponents = tl.load(exponents_ptr + outs)
    for part in tl.static_range(4):
        tl.store(powers_ptr + outs * 4 + part, _bfloat16_power_bits(exponents, part))


def computed(ptx: str, operand: int) -> int:
    """What a few of PTX's instructions for 32 bits make of `$1`, in `$0`."""
    registers = {"$1": operand}
    functions = {"shl": operator.lshift, "shr": operator.rshift, "and": operator.and_, "or": operator.or_}
    for name, given in re.findall(r"(\w+)\.b32 ([^;]*,[^;]*);", ptx):
        to, *operands = (word.strip() for word in given.split(","))
        left, right = (registers[word] if word in registers else int(word, 0) for word in operands)
        registers[to] = functions[name](left, right) & 0xFFFFFFFF
    return registers["$0"]


def test_two_bfloat16_multiplied_are_each_code_at_each_exponent() -> None:
    """The interpreter knows neither PTX nor products of bfloat16: both are computed here."""
    exponents = torch.arange(256).clamp(max=MOST_EXPONENT).to(torch.uint8)
    powers = torch.empty(256, dtype=torch.int16)
    _power_bits_kernel[(1,)](exponents.view(torch.int32), powers, BLOCK_N=64)
    meant_powers = torch.exp2(exponents.double() - 127)
    e2m1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    for part in range(4):
        for code, noise in ((code, noise) for code in range(16) for noise in (0x0000, 0xFFFF)):
            others = noise & ~(15 << (4 * part))
            words = (code << (4 * part) | others) | ((code ^ 15) << (4 * part) | others) << 16
            bits = computed(_bfloat16_bits(part), words)
            for found, one in ((bits & 0xFFFF, code), (bits >> 16, code ^ 15)):
                value = torch.tensor([found], dtype=torch.uint16).view(torch.bfloat16)
                weights = value * powers.view(torch.bfloat16)
                meant = e2m1[one & 7] * meant_powers
                assert torch.equal(weights.abs().double(), meant)
                assert bool((weights.signbit() == bool(one & 8)).all())


def through_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Send models' mixtures to the GPU's kernels; whether each had codes."""
    had_codes: list[bool] = []

    def mixture_here(
        x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: Any, **options: Any
    ) -> torch.Tensor:
        had_codes.append(isinstance(stack, CodedExpertStack))
        return mixture(x, weights, chosen, stack, **options)

    monkeypatch.setattr(kernels, "route", route)
    monkeypatch.setattr(kernels, "mixture", mixture_here)
    return had_codes


def test_a_gpt_oss_in_mxfp4_says_by_its_codes_what_it_says_dequantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_mxfp4_model(tmp_path, seed=4)
    tokens = random_token_ids(19, seed=3)
    on_cpu: Any = load_model(tmp_path, dtype="float32", model_impl="native")
    dequantised_says = run_paged(on_cpu, tokens)
    monkeypatch.setattr(MXFP4Reader, "keeps_codes", True)
    coded_model: Any = load_model(tmp_path, dtype="float32", model_impl="native")
    had_codes = through_the_interpreter(monkeypatch)
    for layer in coded_model.layers:
        layer.mlp.stack_experts()
        assert not layer.mlp.experts, "no floating expert is held beside them"
    torch.testing.assert_close(run_paged(coded_model, tokens), dequantised_says, atol=1e-4, rtol=1e-4)
    assert had_codes == [True] * len(coded_model.layers)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_quantised_at_load_say_by_their_codes_what_they_say_one_by_one(
    model_type: str, quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(model_type, tmp_path, seed=4, num_hidden_layers=1)
    model: Any = load_model(tmp_path, dtype="float32", model_impl="native", quantization=quantization)
    block, x = model.layers[0].mlp, randn(7, 64, seed=8)
    with torch.inference_mode():
        one_by_one = block.forward(x)
        had_codes = through_the_interpreter(monkeypatch)
        block.stack_experts()
        torch.testing.assert_close(block.forward(x), one_by_one, atol=1e-4, rtol=1e-4)
    assert had_codes == [True]


def test_replacing_a_code_changes_what_is_said() -> None:
    """Or agreement above would not prove that all of them are read."""
    stack = make_stack("mxfp4", 2, 160, 40, torch.float32)
    x, weights = randn(3, 160, seed=5), torch.ones(3, 2)
    chosen = torch.tensor([[0, 1]] * 3, dtype=torch.int32)
    said = mixture(x, weights, chosen, stack)
    codes = stack.w13.codes.clone()
    codes[1, 1, 3, 0] ^= 1 << 4  # of what would be input 160
    changed = replace(stack, w13=replace(stack.w13, codes=codes))
    assert torch.equal(mixture(x, weights, chosen, changed), said), "behind the last input nothing counts"
    codes[1, 1, 3, 0] ^= 1  # of input 128
    assert not torch.equal(mixture(x, weights, chosen, changed), said)
