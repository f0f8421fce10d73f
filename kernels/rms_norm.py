"""RMS norm, alone and fused with the residual addition before it."""

from __future__ import annotations

import ctypes

import torch

from . import cpu_build
from .cpu_build import CODE, POINTER, REAL, SIZE


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What `rms_norm` means: in float32 (float64 for float64), rounded once. Source: Zhang and Sennrich 2019, eq. 4."""
    y = x if x.dtype == torch.float64 else x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide each token by its root mean square, summing in float32.

    Args:
        x: `[num_tokens, hidden_size]`, any float dtype.
        weight: gain, `[hidden_size]`, float32 or the dtype of `x` (Gemma's `1 + w` is the caller's to make).
        eps: added to the mean square, > 0.

    Returns:
        A new contiguous tensor like `x`; for each token bitwise the same, whatever else is in the batch.

    Raises:
        MemoryError: on a CPU, no memory for the kernel's scratch.
    """
    if x.device.type == "cuda":
        from .gpu import rms_norm as gpu

        if gpu.can(x, None, weight):
            return gpu.rms_norm(x, weight, eps)
    kernels = _kernels_for(x, weight)
    if kernels is None:
        return rms_norm_ref(x, weight, eps)
    return _launch(kernels, x, None, weight, eps)


def add_rms_norm(x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add `x` to `residual`, and normalise the sum: two of a layer's operations for one pass over its tokens.

    Args:
        x: `[num_tokens, hidden_size]`; None: nothing to add.
        residual: likewise, of the same dtype, changed in place.
        weight, eps: as for `rms_norm`.

    Returns:
        `rms_norm(residual)`, with the bits that it has after `residual.add_(x)`.

    Raises:
        MemoryError: as `rms_norm`.
    """
    if x is None:
        return rms_norm(residual, weight, eps)
    if x.device.type == "cuda":
        from .gpu import rms_norm as gpu

        if gpu.can(x, residual, weight):
            return gpu.add_rms_norm(x, residual, weight, eps)
    kernels = _kernels_for(x, weight)
    if kernels is None or residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        return rms_norm(residual.add_(x), weight, eps)
    return _launch(kernels, x, residual, weight, eps)


def _kernels_for(x: torch.Tensor, weight: torch.Tensor) -> ctypes.CDLL | None:
    if (
        x.device.type != "cpu"
        or x.dtype not in cpu_build.DTYPE_CODES
        or (weight.dtype is not x.dtype and weight.dtype is not torch.float32)
        or x.dim() != 2
        or x.stride(1) != 1
        or weight.shape != x.shape[1:]
        or not weight.is_contiguous()
    ):
        return None
    return _kernels()


def _launch(
    kernels: ctypes.CDLL, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    num_tokens, hidden_size = x.shape
    out = torch.empty((num_tokens, hidden_size), dtype=x.dtype)
    status = kernels.octavo_rms_norm(
        x.data_ptr(),
        x.stride(0),
        None if residual is None else residual.data_ptr(),
        None if residual is None else residual.data_ptr(),  # where the sum goes
        out.data_ptr(),
        weight.data_ptr(),
        num_tokens,
        hidden_size,
        eps,
        cpu_build.DTYPE_CODES[x.dtype],
        cpu_build.DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
    if status != 0:
        raise MemoryError("rms_norm could not allocate its scratch memory")
    return out


_kernels = cpu_build.declared(
    octavo_rms_norm=(CODE, POINTER, SIZE, *(POINTER,) * 4, SIZE, SIZE, REAL, CODE, CODE, CODE)
)
