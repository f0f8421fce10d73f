"""The weights of a mixture's experts behind each other, as products over all of them take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .clamped_swiglu import ClampedSwiGLU
from .expert_codes import ExpertCodes
from .gated_activation import GatedActivation, gelu_tanh_and_mul, silu_and_mul

ACTIVATIONS = (silu_and_mul, gelu_tanh_and_mul)  # beside any `ClampedSwiGLU`


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Experts behind each other, for products over all of them in one launch.

    Attributes:
        w13: `[num_experts, 2 * inner, hidden_size]`: each expert's gate and, behind it, the other input's matrix.
        w2: `[num_experts, hidden_size, inner]`.
        b13, b2: `[num_experts, 2 * inner]` and `[num_experts, hidden_size]`; None for none.
        first: the number that the router knows the first of them by; tokens for others are another rank's.
        act: one of `ACTIVATIONS`, or a `ClampedSwiGLU`.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    first: int
    act: GatedActivation

    def __post_init__(self) -> None:
        _check(self)

    def matrices(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's `w13` and `w2`."""
        return self.w13[expert].to(dtype), self.w2[expert].to(dtype)


@dataclass(frozen=True, slots=True)
class CodedExpertStack:
    """As `ExpertStack`, of matrices that stay codes; they multiply activations of any float dtype."""

    w13: ExpertCodes
    w2: ExpertCodes
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    first: int
    act: GatedActivation

    def __post_init__(self) -> None:
        _check(self)

    def matrices(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's `w13` and `w2`, dequantised."""
        return self.w13.dequantize(expert, dtype), self.w2.dequantize(expert, dtype)


AnyExpertStack = ExpertStack | CodedExpertStack


def is_fusable(act: GatedActivation) -> bool:
    """Whether the products over a stack can activate by `act`."""
    return act in ACTIVATIONS or isinstance(act, ClampedSwiGLU)


def _check(stack: AnyExpertStack) -> None:
    """Raises `ValueError` where the parts of a stack do not fit each other."""
    num_experts, doubled, hidden_size = stack.w13.shape
    if tuple(stack.w2.shape) != (num_experts, hidden_size, doubled // 2) or doubled % 2:
        raise ValueError(f"w13 is {list(stack.w13.shape)} and w2 {list(stack.w2.shape)}: they do not fit each other")
    for bias, shape in ((stack.b13, (num_experts, doubled)), (stack.b2, (num_experts, hidden_size))):
        if bias is not None and tuple(bias.shape) != shape:
            raise ValueError(f"a bias is {list(bias.shape)} instead of {list(shape)}")
    if not is_fusable(stack.act):
        raise ValueError(f"{stack.act} is none of the activations that are fused into the products")
