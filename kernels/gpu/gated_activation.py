"""Gated activations on a GPU: one program for a run of one token's columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_BLOCK = 1024


@triton.jit
def _gated_activation_kernel(
    gate_up_ptr,  # [num_tokens, 2 * intermediate_size], rows stride apart
    out_ptr,  # [num_tokens, intermediate_size], contiguous
    stride,
    intermediate_size,
    GELU: tl.constexpr,  # else SiLU
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < intermediate_size
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + intermediate_size + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        # (1 + tanh(u)) / 2 is the logistic function of 2 u: one exponential, and no cancellation where u is negative.
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    else:
        slope = gate
    # The exponential of a negative number, so that none overflows.
    exponential = tl.exp(-tl.abs(slope))
    activated = gate * tl.where(slope >= 0.0, 1.0, exponential) / (1.0 + exponential)
    tl.store(out_ptr + row * intermediate_size + columns, (activated * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels.gated_activation.silu_and_mul`."""
    return _launch(gate_up, gelu=False)


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels.gated_activation.gelu_tanh_and_mul`."""
    return _launch(gate_up, gelu=True)


def can(gate_up: torch.Tensor) -> bool:
    """Whether the kernel is written for such a tensor."""
    return gate_up.dim() == 2 and gate_up.dtype in DTYPES and gate_up.shape[1] % 2 == 0 and gate_up.stride(1) == 1


def _launch(gate_up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    num_tokens, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, intermediate_size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(_MAX_BLOCK, triton.next_power_of_2(intermediate_size))
        grid = (num_tokens, triton.cdiv(intermediate_size, block))
        _gated_activation_kernel[grid](
            gate_up, out, gate_up.stride(0), intermediate_size, GELU=gelu, BLOCK=block, num_warps=max(1, block // 256)
        )
    return out
