"""A linear layer whose weights are floats of 8 bits, and whose inputs are rounded to such as well."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .fp8_weight import LARGEST, Fp8Weight

_SMALLEST_SCALE = 2.0**-100


def round_inputs_ref(
    x: torch.Tensor, group_size: int, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs as e4m3 codes and scales.

    Without `input_scale` each token's group of inputs is divided by what takes its largest magnitude to 448; with it
    all are divided by that, and what is beyond 448 becomes 448. Then they are rounded to nearest, ties to even: by at
    most 2^-4 of an input, or 2^-10 of its scale, whichever is more.

    Args:
        x: `[num_tokens, in_features]`.
        group_size: inputs that share a scale, the last group may be smaller.

    Returns:
        Codes `[num_tokens, in_features]` float8_e4m3fn and scales `[num_groups, num_tokens]` float32, NaN for a group
        with an input that is not finite; with `input_scale` only NaN is kept, as a code.

    Source: `act_quant` of DeepSeek-V3's inference/kernel.py; compressed-tensors, quantization/lifecycle/forward.py.
    """
    num_tokens, in_features = x.shape
    wide = F.pad(x.float(), (0, -in_features % group_size))
    groups = wide.view(num_tokens, wide.shape[1] // group_size, group_size)
    if input_scale is None:
        scales = groups.abs().amax(-1) / LARGEST
        scales = torch.where(scales.isfinite(), scales.clamp_min(_SMALLEST_SCALE), torch.nan)
        scaled = torch.where(scales.isnan().unsqueeze(-1), 0.0, groups / scales.unsqueeze(-1))
    else:
        scales = input_scale.expand(num_tokens, groups.shape[1])
        scaled = (groups / input_scale).clamp(-LARGEST, LARGEST)
    codes = scaled.to(torch.float8_e4m3fn).view(wide.shape)[:, :in_features]
    return codes.contiguous(), scales.T.contiguous()


def linear_fp8_ref(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """What `linear_fp8` means: rounded inputs times weights in float32, or float64 for float64, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    codes, scales = round_inputs_ref(x, weight.group_size, weight.input_scale)
    inputs = codes.to(wide) * scales.to(wide).T.repeat_interleave(weight.group_size, dim=1)[:, : x.shape[1]]
    return F.linear(inputs, weight.dequantize(wide)).to(x.dtype)


def linear_fp8(x: torch.Tensor, weight: Fp8Weight, *, quick: bool = False) -> torch.Tensor:
    """`x @ weight.T`, of inputs rounded to e4m3, products and sums in float32.

    Args:
        x: `[num_tokens, in_features]`, float32, bfloat16 or float16.
        quick: a few rows of bfloat16 or float16 may be multiplied without rounding them first.

    Returns:
        `[num_tokens, out_features]` of the dtype of `x`. On a GPU, without `quick`, a row has the same bits in any
        batch.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)} and the weight takes [num_tokens, {weight.shape[1]}]")
    if x.is_cuda:
        from .gpu.linear_fp8 import linear_fp8 as on_gpu

        return on_gpu(x, weight, quick=quick)
    return linear_fp8_ref(x, weight)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether `device` is a GPU with products of e4m3: NVIDIA's from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
