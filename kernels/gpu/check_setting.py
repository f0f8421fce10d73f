"""Where kernels are checked, on what random inputs, and how an error is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor

# Relative error (of norms) allowed in each dtype. A product of float32 may be done in tf32.
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how the checks are made.

    Attributes:
        seed: of all inputs.
        small: sizes for the interpreter.
        computes: False on a GPU that computes nothing (`fake_cuda`), where only the launches count: what is right is
            left out if it follows from what has been computed, and every error is 0.
    """

    device: torch.device
    dtype: torch.dtype
    seed: int
    small: bool
    computes: bool = True

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    @property
    def bound(self) -> float:
        return BOUND[self.dtype]


Found = Iterator[tuple[str, float, float]]
"""Case, error, and the bound that it has to keep within."""


class Random:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.generator = setting.generator()

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        s = self._setting
        return (torch.randn(shape, device=s.device, generator=self.generator) * scale).to(s.dtype)

    def floats(self, *shape: int) -> torch.Tensor:
        """Float32 whatever the dtype: hardly any two are equal."""
        return torch.randn(shape, device=self._setting.device, generator=self.generator)

    def randint(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, device=self._setting.device, generator=self.generator)


def error_of(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where anything is NaN."""
    if isinstance(out, FakeTensor):
        return 0.0
    if out.shape != exact.shape or bool(torch.isnan(out).any()):
        return float("inf")
    norm = float(exact.double().norm())
    return float((out.double() - exact.double()).norm()) / (norm or 1.0)


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    """0 if the bits are the same, else 1."""
    return 0.0 if isinstance(one, FakeTensor) else float(not torch.equal(one, other))


def share_that_differs(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the elements."""
    return 0.0 if isinstance(one, FakeTensor) else float((one != other).float().mean())
