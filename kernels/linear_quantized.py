"""A linear layer whose weights have 4 or 8 bits, with a scale for each group of inputs; activations stay floating."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from . import cpu_build
from .cpu_build import CODE, DTYPE_CODES, POINTER, SIZE
from .quantized_weight import QuantizedWeight

_ROWS_AT_ONCE = 4096  # weight rows widened at a time where there is no C library: bounds the scratch memory


def linear_quantized_ref(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """What `linear_quantized` means: the weights in float32, or float64 for float64, and one rounding at the end."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(wide), weight.dequantize(wide)).to(x.dtype)


def linear_quantized(x: torch.Tensor, weight: QuantizedWeight, *, quick: bool = False) -> torch.Tensor:
    """`x @ weight.T`, products and sums in float32.

    For one row the C kernel widens codes in registers as it multiplies; for more it widens some weight rows at a time
    into the L1 cache and multiplies them in register tiles. Without the C library the weights are widened in torch.

    Args:
        x: `[num_tokens, in_features]`, float32, bfloat16 or float16.
        quick: rows of bfloat16 or float16 may be rounded to whole numbers with a scale for each 32 inputs; a row with
            one that is not finite becomes NaN. Beside codes of 8 bits they have 16 and the scale is a power of two,
            which moves an input by at most 2^-15 of the largest among the 32, and bfloat16 within a factor of 2^7 not
            at all. Beside codes of 4 bits they have 8, as in llama.cpp, which moves an input by at most 1/254 of the
            largest; 4 bits move a weight by up to 1/16. On AVX2 (with AVX-512 for few rows) that is up to twice as
            fast.

    Returns:
        `[num_tokens, out_features]` of the dtype of `x`. From the C kernel each element is bitwise the same, whatever
        else is in the batch and however many threads there are; with `quick`, among batches of up to 8 rows (4 with 4
        bits, or groups that are no multiple of 32), and among larger ones.

    Raises:
        MemoryError: no memory for the kernel's scratch.
        ValueError: sizes that do not fit each other.
    """
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x is {list(x.shape)} and the weight takes [num_tokens, {weight.in_features}]")
    if x.is_cuda:
        from .gpu.linear_quantized import linear_quantized as on_gpu

        return on_gpu(x, weight, quick=quick)
    if weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    kernels = _kernels() if x.device.type == "cpu" and x.dtype in DTYPE_CODES else None
    if kernels is None:
        return _in_torch(x, weight)
    x = x.contiguous()
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    status = kernels.octavo_linear_quantized(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        weight.described,
        out.data_ptr(),
        x.shape[0],
        torch.get_num_threads(),
        quick,
    )
    if status != 0:
        raise MemoryError("linear_quantized could not allocate its scratch memory")
    return out


def _in_torch(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """As the meaning, a part of the weights at a time; the inputs of `x` are in the order of the codes already."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    in_order = replace(weight, input_order=None)
    x_wide = x.to(wide)
    parts = [
        F.linear(x_wide, in_order.dequantize(wide, slice(start, start + _ROWS_AT_ONCE))).to(x.dtype)
        for start in range(0, weight.shape[0], _ROWS_AT_ONCE)
    ]
    return torch.cat(parts, dim=1)


_kernels = cpu_build.declared(octavo_linear_quantized=(CODE, POINTER, CODE, POINTER, POINTER, SIZE, CODE, CODE))
