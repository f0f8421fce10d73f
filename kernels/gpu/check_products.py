"""Products against float64: floating and quantised weights, routing, mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import clamped_swiglu, gated_activation, mixture, weight_quantization
from .. import linear_fp8 as fp8
from ..expert_stack import AnyExpertStack, ExpertStack
from ..fp8_weight import Fp8Weight, quantize_fp8
from ..gated_activation import GatedActivation
from . import expert_groups as gpu_groups
from . import linear as gpu_linear
from . import linear_fp8 as gpu_linear_fp8
from . import linear_fp8_skinny
from . import linear_quantized as gpu_linear_quantized
from . import mixture as gpu_mixture
from . import round_inputs as gpu_round_inputs
from .check_setting import Found, Random, Setting, differs, error_of


def check_linear(s: Setting) -> Found:
    random = Random(s)
    sizes = ((24, 64),) if s.small else ((6144, 4096), (4096, 12288), (151936, 1024), (1000, 1000))
    for outs, ins in sizes:
        weight, bias = random.randn(outs, ins, scale=ins**-0.5), random.randn(outs)
        for num_rows in (1, 3) if s.small else (1, 2, 7, 16, 40):
            x = random.randn(num_rows, ins)
            exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
            yield f"{num_rows}x{ins}->{outs}", error_of(gpu_linear.linear(x, weight, bias), exact), s.bound
        out = gpu_linear.linear_deterministic(x, weight, bias)
        yield f"{num_rows}x{ins}->{outs} deterministic", error_of(out, exact), s.bound
        alone = gpu_linear.linear_deterministic(x[-1:], weight, bias)
        yield f"{ins}->{outs}, a row alone", differs(alone, out[-1:]), 0.5


def check_quantized_linear(s: Setting) -> Found:
    random = Random(s)
    outs, ins = (32, 128) if s.small else (4096, 4096)
    floating = random.randn(outs, ins, scale=ins**-0.5).float()
    for bits, group_size in ((8, 64), (4, 32)) if s.small else ((8, 64), (8, ins), (4, 32), (4, 128)):
        weight = weight_quantization.quantize(floating.cpu(), bits=bits, group_size=group_size).to(s.device)
        wide = gpu_linear_quantized.widen(weight, torch.float32).double()
        for num_rows in (2,) if s.small else (1, 16, 40, 300):
            x = random.randn(num_rows, ins)
            exact = x.double() @ wide.T
            for quick in (True, False):
                out = gpu_linear_quantized.linear_quantized(x, weight, quick=quick)
                yield (
                    f"{bits} bits by {group_size}, {num_rows} rows{', quick' if quick else ''}",
                    error_of(out, exact),
                    s.bound,
                )


def check_fp8_linear(s: Setting) -> Found:
    if s.device.type == "cuda" and not fp8.multiplies_fp8(s.device):
        yield "none: weights become floats on this GPU", 0.0, 0.5
        return
    random = Random(s)
    outs, ins = (40, 300) if s.small else (4096, 4096)
    floating = random.randn(outs, ins, scale=ins**-0.5)
    by_row = quantize_fp8(floating, by_block=False)
    kinds: dict[str, Fp8Weight] = {
        "blocks": quantize_fp8(floating, by_block=True),
        "rows": by_row,
        "static": replace(by_row, input_scale=torch.full((1,), 2**-6, dtype=torch.float32, device=s.device)),
    }
    for kind, weight in kinds.items():
        wide = weight.dequantize(torch.float64)
        for num_rows in (2, 66) if s.small else (1, 16, 40, 300, 3000):
            x, name = random.randn(num_rows, ins), f"{kind}, {num_rows} rows"
            codes, scales = gpu_round_inputs.round_inputs(x, weight.group_size, weight.input_scale)
            exact_codes, exact_scales = fp8.round_inputs_ref(x, weight.group_size, weight.input_scale)
            yield f"{name}, codes", differs(codes.view(torch.uint8), exact_codes.view(torch.uint8)), 0.5
            yield f"{name}, scales", differs(scales, exact_scales), 0.5
            exact = fp8.linear_fp8_ref(x.double(), weight)
            out = gpu_linear_fp8.linear_fp8(x, weight)
            yield name, error_of(out, exact), s.bound
            yield f"{name}, a row alone", differs(gpu_linear_fp8.linear_fp8(x[-1:], weight), out[-1:]), 0.5
            is_few = num_rows <= linear_fp8_skinny.MOST_ROWS and s.dtype is not torch.float32
            quick = gpu_linear_fp8.linear_fp8(x, weight, quick=True)
            yield f"{name}, quick", error_of(quick, x.double() @ wide.T if is_few else exact), s.bound


def check_mixture(s: Setting) -> Found:
    random = Random(s)
    experts, chosen_each, hidden, inner = (4, 2, 32, 24) if s.small else (64, 8, 2048, 768)
    clamped = clamped_swiglu.ClampedSwiGLU()

    def clamped_exactly(gate_up: torch.Tensor) -> torch.Tensor:
        return clamped_swiglu.clamped_swiglu_ref(gate_up, clamped.alpha, clamped.limit)

    kinds: tuple[tuple[str, GatedActivation, GatedActivation, bool], ...] = (
        ("silu", gated_activation.silu_and_mul, gated_activation.silu_and_mul_ref, False),
        ("clamped swiglu, biases", clamped, clamped_exactly, True),
    )
    for kind, act, exact_act, has_bias in kinds:
        stack = ExpertStack(
            w13=random.randn(experts, 2 * inner, hidden, scale=hidden**-0.5),
            w2=random.randn(experts, hidden, inner, scale=inner**-0.5),
            b13=random.randn(experts, 2 * inner) if has_bias else None,
            b2=random.randn(experts, hidden) if has_bias else None,
            first=0,
            act=act,
        )
        for tokens in (3,) if s.small else (1, 30, 300, 3000):
            x = random.randn(tokens, hidden)
            weights, chosen = gpu_groups.route(random.randn(tokens, experts), chosen_each, normalizes=True)
            exact = mixture_exactly(x, weights, chosen, stack, exact_act) if s.computes else x
            name = f"{kind}, {tokens} tokens"
            yield name, error_of(gpu_mixture.mixture(x, weights, chosen, stack), exact), 2 * s.bound
            same = gpu_mixture.mixture(x, weights, chosen, stack, batch_invariant=True)
            yield f"{name}, invariant", error_of(same, exact), 2 * s.bound
            alone = gpu_mixture.mixture(x[-1:], weights[-1:], chosen[-1:], stack, batch_invariant=True)
            yield f"{name}, a token alone", differs(alone, same[-1:]), 0.5


def mixture_exactly(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    stack: AnyExpertStack,
    act: GatedActivation,
) -> torch.Tensor:
    """In float64, one expert after the other."""
    wide, out = x.double(), torch.zeros_like(x, dtype=torch.float64)
    for expert in range(stack.w2.shape[0]):
        token, place = torch.where(chosen == expert)
        b13 = None if stack.b13 is None else stack.b13[expert].double()
        b2 = None if stack.b2 is None else stack.b2[expert].double()
        w13, w2 = stack.matrices(expert, torch.float64)
        inner = act(torch.nn.functional.linear(wide[token], w13, b13))
        said = torch.nn.functional.linear(inner, w2, b2)
        out.index_add_(0, token, said * weights[token, place].double().unsqueeze(1))
    return out


def check_routing(s: Setting) -> Found:
    random = Random(s)
    for tokens, experts, count in ((5, 8, 2),) if s.small else ((300, 128, 8), (64, 32, 4), (7, 8, 2)):
        logits = random.floats(tokens, experts)
        weights, chosen = gpu_groups.route(logits, count, normalizes=True)
        exact_weights, exact_chosen = mixture.route_ref(logits.double(), count, normalizes=True)
        yield f"{tokens} of {count} from {experts}, experts", differs(chosen.long(), exact_chosen.long()), 0.5
        yield f"{tokens} of {count} from {experts}, weights", error_of(weights, exact_weights), 1e-5
