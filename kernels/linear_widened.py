"""A quantised linear layer for many rows, on CPUs that multiply 16-bit floats quicker than quantised weights.

With AMX a product of 16-bit floats is some six times as quick as one in float32, which is what `linear_quantized`
computes: 1.58 and 0.26 TFLOP/s at 512 rows on a 2-core machine. So weights are widened to 16 bits, some rows at a time,
which then are multiplied by all rows of `x`; that pays from as many rows on as make up for widening.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import cpu_build
from .cpu_build import CODE, POINTER, SIZE
from .linear_quantized import linear_quantized
from .quantized_weight import QuantizedWeight

_WIDENED_AT_ONCE = 1024  # weight rows: what bounds the scratch memory, to some megabytes


def linear_widened(
    x: torch.Tensor, weight: QuantizedWeight, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.linear
) -> torch.Tensor:
    """`x @ weight.T`, of weights rounded to the dtype of `x`; products and sums are those of `multiply`.

    Rounding moves a weight by at most 2^-9 of itself in bfloat16, where 8 bits in groups have moved it by up to 2^-8 of
    its group's largest; in float16, by 2^-12, and what is below its range becomes zero. Without the C library it is
    `linear_quantized`.

    Args:
        x: `[num_tokens, in_features]`, bfloat16 or float16, on the CPU.
        multiply: as `F.linear`.

    Returns:
        `[num_tokens, out_features]`, the same. The last bits of a row may depend on how many there are.

    Raises:
        ValueError: sizes or dtypes that do not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.in_features or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and must be [num_tokens, {weight.in_features}] in bfloat16 or float16"
        )
    kernels = _kernels()
    if kernels is None:
        return linear_quantized(x, weight)
    if weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    num_outputs, num_inputs = weight.shape
    wide = torch.empty((min(_WIDENED_AT_ONCE, num_outputs), num_inputs), dtype=x.dtype)
    out = torch.empty((x.shape[0], num_outputs), dtype=x.dtype)
    for first in range(0, num_outputs, _WIDENED_AT_ONCE):
        part = wide[: num_outputs - first]
        kernels.octavo_widen(
            *(weight.described, first, part.shape[0], part.data_ptr()),
            *(cpu_build.DTYPE_CODES[x.dtype], torch.get_num_threads()),
        )
        out[:, first : first + part.shape[0]] = multiply(x, part)
    return out


_kernels = cpu_build.declared(octavo_widen=(None, POINTER, SIZE, SIZE, POINTER, CODE, CODE))
