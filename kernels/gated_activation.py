"""Gated activations of a feed-forward layer: the activated gate times the up projection (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import cpu_build
from .cpu_build import CODE, POINTER, SIZE

_SILU, _GELU_TANH = 0, 1  # as in csrc/operations.h

GatedActivation = Callable[[torch.Tensor], torch.Tensor]
"""Takes `[num_tokens, 2 * n]`, whose first half is the gate, to `act(gate) * up`."""


def silu_and_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """What `silu_and_mul` means: in float32 (float64 for float64), rounded once."""
    gate, up = _widen(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_tanh_and_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """What `gelu_tanh_and_mul` means: in float32 (float64 for float64), rounded once."""
    gate, up = _widen(gate_up).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`.

    Args:
        gate_up: `[num_tokens, 2 * intermediate_size]`, the gates in the first half.

    Returns:
        `[num_tokens, intermediate_size]`, new; for each token bitwise the same, whatever else is in the batch.
    """
    out = _launch(gate_up, _SILU)
    return silu_and_mul_ref(gate_up) if out is None else out


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` with the tanh approximation of gelu; otherwise as `silu_and_mul`."""
    out = _launch(gate_up, _GELU_TANH)
    return gelu_tanh_and_mul_ref(gate_up) if out is None else out


C_CODES: dict[GatedActivation, int] = {silu_and_mul: _SILU, gelu_tanh_and_mul: _GELU_TANH}
"""Those that have a C kernel, and what it calls them."""


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _launch(gate_up: torch.Tensor, kind: int) -> torch.Tensor | None:
    """The C or the GPU kernel's result; None where neither applies."""
    if gate_up.device.type == "cuda":
        from .gpu import gated_activation as gpu

        if gpu.can(gate_up):
            return gpu.silu_and_mul(gate_up) if kind == _SILU else gpu.gelu_tanh_and_mul(gate_up)
    if (
        gate_up.device.type != "cpu"
        or gate_up.dtype not in cpu_build.DTYPE_CODES
        or gate_up.dim() != 2
        or gate_up.shape[1] % 2
        or gate_up.stride(1) != 1
    ):
        return None
    kernels = _kernels()
    if kernels is None:
        return None
    num_tokens, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, intermediate_size), dtype=gate_up.dtype)
    kernels.octavo_gated_activation(
        gate_up.data_ptr(),
        gate_up.stride(0),
        out.data_ptr(),
        num_tokens,
        intermediate_size,
        kind,
        cpu_build.DTYPE_CODES[gate_up.dtype],
        torch.get_num_threads(),
    )
    return out


_kernels = cpu_build.declared(octavo_gated_activation=(None, POINTER, SIZE, POINTER, SIZE, SIZE, CODE, CODE, CODE))
