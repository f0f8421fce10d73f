"""The gated activation of GPT-OSS: a clamped SwiGLU whose up projection is moved by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cpu_build
from .cpu_build import CODE, POINTER, REAL, SIZE


def clamped_swiglu_ref(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """What `ClampedSwiGLU` means: in float32 (float64 for float64), rounded once."""
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = wide.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * (gate * torch.sigmoid(gate * alpha))).to(gate_up.dtype)


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """`(clamp(up, -limit, limit) + 1) * gate * sigmoid(alpha * gate)`, the gate cut off at `limit` before.

    Source: OpenAI 2025 (gpt-oss model card), and its implementation in `transformers`.

    Attributes:
        alpha: how steep the sigmoid is.
        limit: > 0.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Activate.

        Args:
            gate_up: `[num_tokens, 2 * intermediate_size]`, the gates in the first half.

        Returns:
            `[num_tokens, intermediate_size]`, new; from the C kernel for each token bitwise the same, whatever else is
            in the batch.
        """
        can = (
            gate_up.device.type == "cpu"
            and gate_up.dtype in cpu_build.DTYPE_CODES
            and gate_up.dim() == 2
            and gate_up.shape[1] % 2 == 0
            and gate_up.stride(1) == 1
        )
        kernels = _kernels() if can else None
        if kernels is None:
            return clamped_swiglu_ref(gate_up, self.alpha, self.limit)
        num_tokens, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((num_tokens, intermediate_size), dtype=gate_up.dtype)
        kernels.octavo_clamped_swiglu(
            *(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), num_tokens, intermediate_size),
            *(self.alpha, self.limit, cpu_build.DTYPE_CODES[gate_up.dtype], torch.get_num_threads()),
        )
        return out


_kernels = cpu_build.declared(octavo_clamped_swiglu=(None, POINTER, SIZE, POINTER, SIZE, SIZE, REAL, REAL, CODE, CODE))
