"""Linear layers whose weights are floats of 8 bits (e4m3), on a GPU.

Many rows: inputs are rounded to 8 bits as well (`round_inputs`), and the tensor cores multiply 8 bits by 8, twice as
quick as 16 by 16. Those of Hopper keep some 14 bits of a sum of such products (DeepSeek-AI 2024, section 3.3.2), so
that no more than 128 inputs are added up there and the rest in float32 registers, with the scales of a group.

Few rows, where memory counts: weights are 8 bits to read either way, and are widened for inputs as they are
(`linear_fp8_skinny`). Rounding those would be another launch, of more than a microsecond beside some two to ten, and an
error for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..fp8_weight import Fp8Weight
from .launch import UPCAST, num_processors
from .linear_fp8_skinny import MOST_ROWS, linear_fp8_skinny
from .round_inputs import GROUP, round_inputs

_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How a product of many rows is divided; of a group of inputs at a time.

    Attributes:
        is_wide: a program has two tiles beside each other, of the same rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    is_wide: bool = False

    @property
    def num_outputs(self) -> int:
        """Of a program."""
        return self.block_n * (1 + self.is_wide)


WIDE = TilePlan(block_m=128, block_n=128, num_warps=8, num_stages=4, is_wide=True)
LARGE = TilePlan(block_m=128, block_n=128, num_warps=8, num_stages=4)
SMALL = TilePlan(block_m=64, block_n=64, num_warps=4, num_stages=4)


def tile_plan(num_rows: int, weight: Fp8Weight, processors: int, *, quick: bool) -> TilePlan:
    """As large tiles as every processor gets one of; small ones always if rows may not count.

    Large ones spare the L2 cache, which a processor asks for 48 bytes a cycle for wide ones and 64 for single ones, at
    full speed. What has scales of its own for each group takes more registers: there are not enough for wide ones, nor
    for large ones where each output has its own as well.
    """
    out_features, by_group = weight.shape[0], weight.scales.shape[1] > 1
    tiles = triton.cdiv(num_rows, LARGE.block_m) * triton.cdiv(out_features, LARGE.block_n)
    if not quick or tiles < processors or (by_group and weight.rows_per_scale == 1):
        return SMALL
    is_wide = tiles >= 2 * processors and not by_group and out_features % WIDE.num_outputs == 0
    return WIDE if is_wide else LARGE


@triton.jit
def _scales(x_scale, weight_scale, ROWS_PER_SCALE: tl.constexpr):
    """What a tile's products are multiplied by; where a scale is of many outputs, of all that the tile has."""
    if ROWS_PER_SCALE == 1:
        return x_scale[:, None] * weight_scale[None, :]
    else:
        return (x_scale * weight_scale)[:, None]


@triton.jit
def _scales_at(
    scales_ptr, first_out, out_features, num_groups, ROWS_PER_SCALE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Where a tile's weight scales begin; of outputs that are not there, those of the last that is."""
    if ROWS_PER_SCALE == 1:
        return scales_ptr + tl.minimum(first_out + tl.arange(0, BLOCK_N), out_features - 1) * num_groups
    else:
        return scales_ptr + (first_out // ROWS_PER_SCALE) * num_groups


@triton.jit
def _load_tile(at, offsets, k, in_features, EVEN_K: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets within a tile are of 32 bits: pointers would take as many registers again as there are left."""
    if EVEN_K:
        tile = tl.load(at + k + offsets)
    else:
        tile = tl.load(at + k + offsets, mask=(k + tl.arange(0, BLOCK_K) < in_features)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store_tile(out_ptr, total, rows, first_out, num_rows, out_features, BLOCK_N: tl.constexpr):
    outs = first_out + tl.arange(0, BLOCK_N)
    to = out_ptr + rows.to(tl.int64)[:, None] * out_features + outs[None, :]
    is_stored = (rows < num_rows)[:, None] & (outs < out_features)[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=is_stored)


@triton.jit(do_not_specialize=["num_rows"])
def _tiles_kernel(
    x_ptr,  # [num_rows, in_features] e4m3
    x_scales_ptr,  # [num_groups, num_rows]; [1, num_rows] without BY_GROUP
    weight_ptr,  # [out_features, in_features] e4m3
    weight_scales_ptr,  # [ceil(out_features / ROWS_PER_SCALE), num_groups]
    out_ptr,  # [num_rows, out_features]
    num_rows,
    out_features,
    in_features,
    num_groups,
    BY_GROUP: tl.constexpr,  # each BLOCK_K inputs have scales of their own
    ROWS_PER_SCALE: tl.constexpr,  # 1, or a multiple of BLOCK_N
    EVEN_K: tl.constexpr,  # in_features is a multiple of BLOCK_K
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,  # two tiles beside each other, all of whose outputs are there; not BY_GROUP
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TURN: tl.constexpr,
):
    # TURN blocks of rows take turns within a column of weights, which stays in the L2 cache for them.
    program = tl.program_id(0)
    num_outputs: tl.constexpr = BLOCK_N * 2 if WIDE else BLOCK_N
    num_m, num_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, num_outputs)
    turn = program // (TURN * num_n)
    of_turn = tl.minimum(num_m - turn * TURN, TURN)
    within = program % (TURN * num_n)
    first_row = (turn * TURN + within % of_turn) * BLOCK_M
    first_out = (within // of_turn) * num_outputs
    # Rows and outputs that are not there are read as the last that is, and never stored.
    ks = tl.arange(0, BLOCK_K)[None, :]
    x_rows = tl.minimum(tl.arange(0, BLOCK_M), num_rows - 1 - first_row)
    weight_rows = tl.minimum(tl.arange(0, BLOCK_N), out_features - 1 - first_out)
    x_offsets, weight_offsets = x_rows[:, None] * in_features + ks, weight_rows[:, None] * in_features + ks
    x_at = x_ptr + first_row.to(tl.int64) * in_features
    weight_at = weight_ptr + first_out.to(tl.int64) * in_features
    x_scale_at = x_scales_ptr + first_row + x_rows
    weight_scale_at = _scales_at(weight_scales_ptr, first_out, out_features, num_groups, ROWS_PER_SCALE, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BY_GROUP:
        x_scale, weight_scale = tl.load(x_scale_at), tl.load(weight_scale_at)
    if WIDE:
        other_at, other_out = weight_at + BLOCK_N * in_features, first_out + BLOCK_N
        other_total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        x = _load_tile(x_at, x_offsets, k, in_features, EVEN_K, UPCAST, BLOCK_K)
        weight = _load_tile(weight_at, weight_offsets, k, in_features, EVEN_K, UPCAST, BLOCK_K)
        if BY_GROUP:  # the next one's scales come while this one is multiplied
            later = tl.minimum(k // BLOCK_K + 1, num_groups - 1)
            next_x_scale = tl.load(x_scale_at + later * num_rows)
            next_weight_scale = tl.load(weight_scale_at + later)
            product = tl.dot(x, weight.T, input_precision="ieee")
            total += product * _scales(x_scale, weight_scale, ROWS_PER_SCALE)
            x_scale, weight_scale = next_x_scale, next_weight_scale
        else:
            total += tl.dot(x, weight.T, input_precision="ieee")
        if WIDE:
            other = _load_tile(other_at, weight_offsets, k, in_features, EVEN_K, UPCAST, BLOCK_K)
            other_total += tl.dot(x, other.T, input_precision="ieee")
    rows = first_row + tl.arange(0, BLOCK_M)
    if not BY_GROUP:
        x_scale = tl.load(x_scale_at)
        total *= _scales(x_scale, tl.load(weight_scale_at), ROWS_PER_SCALE)
    _store_tile(out_ptr, total, rows, first_out, num_rows, out_features, BLOCK_N)
    if WIDE:
        scale_at = _scales_at(weight_scales_ptr, other_out, out_features, num_groups, ROWS_PER_SCALE, BLOCK_N)
        other_total *= _scales(x_scale, tl.load(scale_at), ROWS_PER_SCALE)
        _store_tile(out_ptr, other_total, rows, other_out, num_rows, out_features, BLOCK_N)


def linear_fp8_tiles(x: torch.Tensor, weight: Fp8Weight, *, quick: bool = False) -> torch.Tensor:
    """`x @ weight.T` of rounded inputs, by tiles: `linear_fp8.linear_fp8_ref`.

    Args:
        quick: the size of the tiles, and so a row's bits, may depend on how many rows there are.
    """
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    codes, scales = round_inputs(x, weight.group_size, weight.input_scale)
    plan = tile_plan(num_rows, weight, num_processors(x.device), quick=quick)
    _tiles_kernel[(triton.cdiv(num_rows, plan.block_m) * triton.cdiv(out_features, plan.num_outputs),)](
        *(codes, scales, weight.codes, weight.scales, out, num_rows, out_features, in_features),
        weight.scales.shape[1],
        BY_GROUP=weight.scales.shape[1] > 1,
        ROWS_PER_SCALE=weight.rows_per_scale,
        EVEN_K=in_features % GROUP == 0,
        UPCAST=UPCAST,
        WIDE=plan.is_wide,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=GROUP,
        TURN=8,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out


def linear_fp8(x: torch.Tensor, weight: Fp8Weight, *, quick: bool = False) -> torch.Tensor:
    """`x @ weight.T`, see `kernels.linear_fp8.linear_fp8`.

    With `quick` up to 64 rows are multiplied by the widened weights, and a row's bits may depend on how many there are;
    else inputs are rounded always, and its bits are its own.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)} and the weight takes [num_tokens, {weight.shape[1]}]")
    if quick and 0 < x.shape[0] <= MOST_ROWS and x.dtype in _DTYPES:
        return linear_fp8_skinny(x, weight)
    return linear_fp8_tiles(x, weight, quick=quick)
