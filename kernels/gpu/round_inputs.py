"""Inputs of a linear layer rounded to floats of 8 bits (e4m3): what `linear_fp8.round_inputs_ref` says, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .kv_rows import fp8_e4m3_codes, largest_of_rows, row_codes, row_scales

GROUP = 128  # inputs that share a scale, where not all of a row do


@triton.jit(do_not_specialize=["num_rows"])
def _round_groups_kernel(
    x_ptr,  # [num_rows, in_features], rows `x_stride` apart
    codes_ptr,  # [num_rows, in_features] uint8
    scales_ptr,  # [num_groups, num_rows]; with STATIC [1, num_rows]
    input_scale_ptr,  # [1]
    num_rows,
    in_features,
    num_groups,  # of WIDTH inputs
    x_stride,
    STATIC: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    at = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row, group = (at // num_groups).to(tl.int64), at % num_groups
    is_row = row < num_rows
    columns = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = is_row[:, None] & (columns < in_features)
    x = tl.load(x_ptr + row[:, None] * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.load(input_scale_ptr + tl.zeros_like(row))
        tl.store(scales_ptr + row, scale, mask=is_row & (group == 0))
        scaled = tl.div_rn(x, scale[:, None])
        within = tl.minimum(tl.maximum(tl.where(scaled == scaled, scaled, 0.0), -448.0), 448.0)
        codes = tl.where(scaled == scaled, fp8_e4m3_codes(within), 0x7F).to(tl.uint8)
    else:
        scale = row_scales(largest_of_rows(x), True)
        tl.store(scales_ptr + group.to(tl.int64) * num_rows + row, scale, mask=is_row)
        codes = row_codes(x, scale[:, None], True)
    tl.store(codes_ptr + row[:, None] * in_features + columns, codes, mask=mask)


@triton.jit
def _round_rows_kernel(
    x_ptr,  # [num_rows, in_features], rows `x_stride` apart
    codes_ptr,  # [num_rows, in_features] uint8
    scales_ptr,  # [num_rows]
    in_features,
    x_stride,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)[None, :]
    x_row = x_ptr + row * x_stride
    largest = tl.zeros((1,), dtype=tl.float32)
    for k in range(0, in_features, WIDTH):
        x = tl.load(x_row + k + columns, mask=k + columns < in_features, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, largest_of_rows(x))
    scale = row_scales(largest, True)
    tl.store(scales_ptr + row + tl.arange(0, 1), scale)
    for k in range(0, in_features, WIDTH):  # again, from the caches
        x = tl.load(x_row + k + columns, mask=k + columns < in_features, other=0.0).to(tl.float32)
        codes = row_codes(x, scale[:, None], True)
        tl.store(codes_ptr + row * in_features + k + columns, codes, mask=k + columns < in_features)


def round_inputs(
    x: torch.Tensor, group_size: int, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `linear_fp8.round_inputs_ref`; `group_size` is 128 or all inputs, and with `input_scale` all."""
    num_rows, in_features = x.shape
    is_static = input_scale is not None
    by_group = group_size == GROUP and in_features > GROUP and not is_static
    codes = torch.empty((num_rows, in_features), dtype=torch.float8_e4m3fn, device=x.device)
    num_scales = triton.cdiv(in_features, GROUP) if by_group else 1
    scales = torch.empty((num_scales, num_rows), dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return codes, scales
    if x.stride(1) != 1:
        x = x.contiguous()
    as_bytes = codes.view(torch.uint8)
    if by_group or is_static:
        num_groups, groups_at_once = triton.cdiv(in_features, GROUP), 16
        _round_groups_kernel[(triton.cdiv(num_rows * num_groups, groups_at_once),)](
            *(x, as_bytes, scales, input_scale, num_rows, in_features, num_groups, x.stride(0)),
            STATIC=is_static,
            GROUPS=groups_at_once,
            WIDTH=GROUP,
            num_warps=4,
        )
    else:
        width = min(2048, triton.next_power_of_2(in_features))
        _round_rows_kernel[(num_rows,)](*(x, as_bytes, scales, in_features, x.stride(0)), WIDTH=width, num_warps=4)
    return codes, scales
