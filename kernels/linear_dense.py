"""A linear layer with floating weights: on CPUs in each storage type, on GPUs by their kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu_build
from .cpu_build import CODE, POINTER, SIZE


def linear_dense_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `linear_dense` means: products summed in float32 (float64 for float64), rounded once."""
    if x.dtype == torch.float64:
        return F.linear(x, weight.double())
    return F.linear(x.float(), weight.float()).to(x.dtype)


def linear_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, products summed in float32.

    Weights are read as they lie in memory, once, and widened in registers, again for each six rows. On an AVX2 CPU
    torch has slow code for bfloat16 from two rows on, and for float32 between 2 and 32:
    `python -m octavo.kernels.bench_cpu --products` compares. Without the C library it is `F.linear`.

    Args:
        x: `[num_tokens, in_features]`, float32, bfloat16 or float16.
        weight: `[out_features, in_features]`, contiguous, of any of these dtypes: a checkpoint's bfloat16 weights are
            the same numbers in float32, at twice the memory to read.
        bias: `[out_features]`, added after the product has been rounded; None for none.

    Returns:
        `[num_tokens, out_features]` of the dtype of `x`. From the C kernel each element is bitwise the same, whatever
        else is in the batch and however many threads there are. On a GPU see `gpu.linear`.
    """
    return _multiply(x, weight, bias, quick=False)


def linear_dense_quick(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear_dense`, but many rows of bfloat16 are multiplied in whole numbers where the CPU does that quicker.

    There each number is rounded to 2^-12 or less of the largest of 64 beside each other (storing it in bfloat16 has
    rounded it to 2^-9 of itself), and products are summed exactly: see csrc/linear_whole.c. So the last bit may depend
    on whether there are few rows or many, not on what is in them. On an AVX2 CPU with 512 rows 1.46 times as quick
    (`python -m octavo.kernels.bench_cpu --products`).
    """
    return _multiply(x, weight, bias, quick=True)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, quick: bool) -> torch.Tensor:
    if x.is_cuda and x.dim() == 2:
        from .gpu.linear import linear as on_gpu

        return on_gpu(x, weight.to(x.dtype), bias)
    if (
        x.dtype not in cpu_build.DTYPE_CODES
        or weight.dtype not in cpu_build.DTYPE_CODES
        or x.device.type != "cpu"
        or x.dim() != 2
        or not weight.is_contiguous()
    ):
        return F.linear(x, weight.to(x.dtype), bias)
    kernels = _kernels()
    if kernels is None:
        return F.linear(x, weight.to(x.dtype), bias)
    x = x.contiguous()
    num_tokens, in_features = x.shape
    if weight.shape[1] != in_features:
        raise ValueError(f"x has {in_features} features and weight takes {weight.shape[1]}")
    out = torch.empty((num_tokens, weight.shape[0]), dtype=x.dtype)
    multiply = kernels.octavo_linear_quick if quick else kernels.octavo_linear
    status = multiply(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        num_tokens,
        in_features,
        weight.shape[0],
        cpu_build.DTYPE_CODES[x.dtype],
        cpu_build.DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
    if status != 0:
        raise MemoryError("linear_dense could not allocate its scratch memory")
    return out if bias is None else out.add_(bias)


_MULTIPLY = (CODE, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, CODE, CODE, CODE)
_kernels = cpu_build.declared(octavo_linear=_MULTIPLY, octavo_linear_quick=_MULTIPLY)
