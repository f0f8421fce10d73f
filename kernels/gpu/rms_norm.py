"""RMS norm on a GPU, alone and fused with the residual addition before it; one token per program.

A token's bits depend on its own row alone: its sum is a tree whose shape follows from `hidden_size`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HIDDEN_SIZE = 32768  # a row is held in registers: 64 numbers a thread at 16 warps


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [num_tokens, hidden_size], rows x_stride apart
    residual_ptr,  # likewise, to become the sum; None: nothing to add
    weight_ptr,  # [hidden_size]
    out_ptr,  # [num_tokens, hidden_size], contiguous
    x_stride,
    residual_stride,
    hidden_size,
    eps,
    BLOCK: tl.constexpr,  # power of two, >= hidden_size
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden_size
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    # Before the sum is needed, so that both loads are in flight together.
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row * residual_stride + columns
        residual = tl.load(residual_ptrs, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)  # what is kept is what is normed
        tl.store(residual_ptrs, x, mask=mask)
    y = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, axis=0) / hidden_size + eps)
    tl.store(out_ptr + row * hidden_size + columns, (y * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def num_warps_of(block: int) -> int:
    """Warps for a row of `block` numbers: eight to a thread, so that a half-precision load is 16 bytes wide."""
    return min(16, max(1, block // 256))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.rms_norm.rms_norm`."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.rms_norm.add_rms_norm`."""
    return _launch(x, residual, weight, eps)


def can(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """Whether the kernel is written for such tensors."""
    return (
        x.dim() == 2
        and x.dtype in DTYPES
        and x.stride(1) == 1
        and weight.dtype in DTYPES
        and weight.shape == x.shape[1:]
        and weight.is_contiguous()
        and 1 <= x.shape[1] <= MAX_HIDDEN_SIZE
        and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype and residual.stride(1) == 1))
    )


def _launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    num_tokens, hidden_size = x.shape
    out = torch.empty((num_tokens, hidden_size), dtype=x.dtype, device=x.device)
    if num_tokens:
        block = triton.next_power_of_2(hidden_size)
        _rms_norm_kernel[(num_tokens,)](
            *(x, residual, weight, out),
            *(x.stride(0), 0 if residual is None else residual.stride(0), hidden_size, eps),
            BLOCK=block,
            num_warps=num_warps_of(block),
        )
    return out
