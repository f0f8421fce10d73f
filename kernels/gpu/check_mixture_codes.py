"""Mixtures of experts that stay codes, against float64."""

from __future__ import annotations

import torch

from .. import clamped_swiglu, gated_activation
from ..expert_codes import ExpertCodes, coded
from ..expert_stack import CodedExpertStack
from ..gated_activation import GatedActivation
from ..quantized_weight import QuantizedWeight
from . import expert_groups as gpu_groups
from . import mixture as gpu_mixture
from .check_products import mixture_exactly
from .check_setting import Found, Random, Setting, differs, error_of

KINDS = ("mxfp4", "int4 by 32", "int4 by 128, zeros", "int8 by 64")


def random_codes(random: Random, kind: str, num_experts: int, out_features: int, in_features: int) -> ExpertCodes:
    """Random codes of one of `KINDS`, for weights of about the inverse root of `in_features`."""
    if kind == "mxfp4":
        groups = -(-in_features // 32)
        middle = 125 - in_features.bit_length() // 2

        def part() -> tuple[torch.Tensor, torch.Tensor]:
            blocks = random.randint(0, 256, out_features, groups, 16).to(torch.uint8)
            return blocks, random.randint(middle - 1, middle + 2, out_features, groups).to(torch.uint8)

        parts = (part() for _ in range(num_experts))
        return ExpertCodes.from_mxfp4(parts, num_experts=num_experts, in_features=in_features)
    bits, group_size = {"int4 by 32": (4, 32), "int4 by 128, zeros": (4, 128), "int8 by 64": (8, 64)}[kind]
    low, high = (0, 16) if bits == 4 else (-128, 128)

    def weight() -> QuantizedWeight:
        codes = random.randint(low, high, out_features, in_features)
        scales = random.floats(out_features, -(-in_features // group_size)).mul_(1 / high / in_features**0.5)
        zeros = random.randint(0, 16, *scales.shape).to(torch.int16) if "zeros" in kind else None
        return QuantizedWeight.from_codes(codes, scales.bfloat16(), bits=bits, group_size=group_size, zeros=zeros)

    made = coded([weight() for _ in range(num_experts)])
    assert made is not None, "they are all of one kind"
    return made


def check_mixture_codes(s: Setting) -> Found:
    random = Random(s)
    experts, chosen_each, hidden, inner = (4, 2, 160, 24) if s.small else (16, 4, 2880, 1440)
    clamped = clamped_swiglu.ClampedSwiGLU()

    def clamped_exactly(gate_up: torch.Tensor) -> torch.Tensor:
        return clamped_swiglu.clamped_swiglu_ref(gate_up, clamped.alpha, clamped.limit)

    for kind in KINDS:
        is_gpt_oss = kind == "mxfp4"
        act: GatedActivation = clamped if is_gpt_oss else gated_activation.silu_and_mul
        exact_act = clamped_exactly if is_gpt_oss else gated_activation.silu_and_mul_ref
        stack = CodedExpertStack(
            w13=random_codes(random, kind, experts, 2 * inner, hidden),
            w2=random_codes(random, kind, experts, hidden, inner),
            b13=random.randn(experts, 2 * inner) if is_gpt_oss else None,
            b2=random.randn(experts, hidden) if is_gpt_oss else None,
            first=0,
            act=act,
        )
        for tokens in (3,) if s.small else (1, 20, 200, 2000):
            x = random.randn(tokens, hidden)
            weights, chosen = gpu_groups.route(random.randn(tokens, experts), chosen_each, of_chosen=True)
            exact = mixture_exactly(x, weights, chosen, stack, exact_act) if s.computes else x
            name = f"{kind}, {tokens} tokens"
            yield name, error_of(gpu_mixture.mixture(x, weights, chosen, stack), exact), 2 * s.bound
            same = gpu_mixture.mixture(x, weights, chosen, stack, batch_invariant=True)
            yield f"{name}, invariant", error_of(same, exact), 2 * s.bound
            alone = gpu_mixture.mixture(x[-1:], weights[-1:], chosen[-1:], stack, batch_invariant=True)
            yield f"{name}, a token alone", differs(alone, same[-1:]), 0.5
