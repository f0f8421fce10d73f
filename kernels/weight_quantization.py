"""Rounding weights to codes of 4 or 8 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu_build, huge_pages
from .code_layout import codes_shape, padded_inputs
from .cpu_build import CODE, DTYPE_CODES, POINTER, SIZE
from .quantized_weight import QuantizedWeight


def quantize(weight: torch.Tensor, *, bits: int, group_size: int) -> QuantizedWeight:
    """Round weights to the nearest of `2 ** bits` evenly spaced values, symmetric about zero, group by group.

    The scale is a bfloat16, which has the range of float32. With 4 bits the weight of largest magnitude becomes -8
    (as in GGUF's Q4_0), with 8 bits +-127.

    Args:
        weight: `[out_features, in_features]`, any float dtype, finite.

    Returns:
        Each weight within half a scale of its own (with 4 bits within one, near the largest with the other sign).

    Raises:
        MemoryError: no memory for the kernel's scratch.
        ValueError: a weight that is not finite.
    """
    can = weight.device.type == "cpu" and weight.dtype in DTYPE_CODES and group_size % 32 == 0 and bits in (4, 8)
    kernels = _kernels() if can else None
    if kernels is None:
        return _in_torch(weight, bits, group_size)
    out_features, in_features = weight.shape
    weight = weight.contiguous()
    codes = huge_pages.empty(codes_shape(out_features, padded_inputs(in_features), bits), torch.uint8)
    codes[-1] = 0  # of the last rows, which may be fewer than lie among each other
    scales = torch.empty((out_features, -(-in_features // group_size)), dtype=torch.bfloat16)
    sizes = (out_features, in_features, bits, group_size)
    status = kernels.octavo_quantize(
        *(weight.data_ptr(), DTYPE_CODES[weight.dtype], *sizes, codes.data_ptr(), scales.data_ptr()),
        torch.get_num_threads(),
    )
    if status < 0:
        raise MemoryError("quantize could not allocate its scratch memory")
    if status > 0:
        raise ValueError("weights that are not finite cannot be quantised")
    huge_pages.merge_pages(codes)
    return QuantizedWeight(codes, scales, None, None, bits, group_size, in_features)


def _in_torch(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """The same, bit for bit."""
    out_features, in_features = weight.shape
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weights that are not finite cannot be quantised")
    padded_groups = -(-in_features // group_size)
    groups = F.pad(weight.float(), (0, padded_groups * group_size - in_features))
    groups = groups.view(out_features, padded_groups, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    if bits == 4:
        largest = torch.where(-low > high, low, high)
        scales = (largest / -8).bfloat16()
    else:
        largest = torch.maximum(-low, high)
        scales = (largest / 127).bfloat16()
        # Rounded up, so that the largest does not fall outside; stepping the bits up is the next number.
        scales = torch.where(
            scales.float() * 127 < largest, (scales.view(torch.int16) + 1).view(torch.bfloat16), scales
        )
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales.float())
    codes = groups.mul_(inverse.unsqueeze(-1)).round_()
    codes = codes.add_(8).clamp_(0, 15) if bits == 4 else codes.clamp_(-127, 127)
    codes = codes.view(out_features, -1)[:, :in_features].to(torch.int16)
    return QuantizedWeight.from_codes(codes, scales, bits=bits, group_size=group_size)


_kernels = cpu_build.declared(octavo_quantize=(CODE, POINTER, CODE, SIZE, SIZE, CODE, SIZE, POINTER, POINTER, CODE))
