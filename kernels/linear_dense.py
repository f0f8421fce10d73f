"""A bfloat16 linear layer for CPUs whose torch has no fast one (no AVX512-BF16, no AMX)."""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F

from . import cpu_build


def linear_bf16_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `linear_bf16` means: products summed in float32 (float64 for float64), rounded once."""
    if x.dtype == torch.float64:
        return F.linear(x, weight)
    return F.linear(x.float(), weight.float()).to(x.dtype)


def linear_bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`, summed in float32.

    Widens a few weights at a time, once for many rows, and multiplies in float32, where torch on an AVX2 CPU falls back
    on slow code from two rows on. `python -m octavo.kernels.bench_cpu` compares it with that code and with torch's own
    product of float32 matrices, for which weights would take twice the memory. Without the C library it is `F.linear`.

    Args:
        x: `[num_tokens, in_features]` bfloat16.
        weight: `[out_features, in_features]` bfloat16, contiguous.

    Returns:
        `[num_tokens, out_features]` bfloat16. From the C kernel each element is bitwise the same, whatever else is in
        the batch and however many threads there are.
    """
    if (
        x.dtype is not torch.bfloat16
        or weight.dtype is not torch.bfloat16
        or x.device.type != "cpu"
        or x.dim() != 2
        or not weight.is_contiguous()
    ):
        return F.linear(x, weight)
    kernels = _kernels()
    if kernels is None:
        return F.linear(x, weight)
    x = x.contiguous()
    num_tokens, in_features = x.shape
    if weight.shape[1] != in_features:
        raise ValueError(f"x has {in_features} features and weight takes {weight.shape[1]}")
    out = torch.empty((num_tokens, weight.shape[0]), dtype=x.dtype)
    status = kernels.octavo_linear_bf16(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        num_tokens,
        in_features,
        weight.shape[0],
        torch.get_num_threads(),
    )
    if status != 0:
        raise MemoryError("linear_bf16 could not allocate its scratch memory")
    return out


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    kernels = cpu_build.library()
    if kernels is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        kernels.octavo_linear_bf16.argtypes = (pointer, pointer, pointer, size, size, size, ctypes.c_int)
        kernels.octavo_linear_bf16.restype = ctypes.c_int
    return kernels
