"""What the compiler makes of the products for Hopper: warp groups where arithmetic counts, and nothing spilt."""

from __future__ import annotations

from typing import Any

import pytest
from sm90 import MAX_SHARED_BYTES, Report, Variant, compile_all

from octavo.kernels.gpu.linear_quantized import num_stages
from octavo.kernels.gpu.mixture_tiles import TILES

_LINEAR, _MIXTURE = "octavo.kernels.gpu.linear", "octavo.kernels.gpu.mixture"
_QUANTIZED, _GROUPS = "octavo.kernels.gpu.linear_quantized", "octavo.kernels.gpu.expert_groups"

_SIZES = {"num_rows": "i32", "out_features": "i32:16", "in_features": "i32:16", "x_stride": "i32:16"}
_POINTERS = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
_GROUPED = {
    **{"weight_ptr": "*bf16", "bias_ptr": "*bf16", "pairs_ptr": "*i32", "experts_ptr": "*i32", "num_pairs": "i32"},
    **{"first": "i32", "num_experts": "i32", "hidden_size": "i32:16", "inner": "i32:16"},
}


def skinny(*, split: bool) -> Variant:
    return Variant(
        f"{_LINEAR}:_skinny_kernel",
        {**_POINTERS, **_SIZES, "inputs_per_split": "i32:16", "out_ptr": "*fp32" if split else "*bf16"},
        {
            **{"HAS_BIAS": True, "SPLIT": split, "EVEN_K": True, "UPCAST": False},
            **{"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256},
        },
        num_warps=4,
        num_stages=4,
    )


def deterministic() -> Variant:
    return Variant(
        f"{_LINEAR}:_deterministic_kernel",
        {**_POINTERS, **_SIZES},
        {"HAS_BIAS": True, "UPCAST": False, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8},
        num_warps=4,
        num_stages=4,
    )


def codes(
    bits: int, block_m: int, *, halves: bool = False, zeros: bool = True, split: bool = False, dtype: str = "bf16"
) -> Variant:
    return Variant(
        f"{_QUANTIZED}:_codes_kernel",
        {
            **{"x_ptr": f"*{dtype}", "codes_ptr": "*i16" if bits == 4 else "*i8", "scales_ptr": "*bf16"},
            **{"zeros_ptr": "*i16", "offsets_ptr": "*fp32", "out_ptr": "*fp32" if split else f"*{dtype}", **_SIZES},
            **{"code_stride": "i32:16", "num_groups": "i32:16", "group_size": "i32:16", "inputs_per_split": "i32:16"},
        },
        {
            **{"BITS": bits, "HAS_ZEROS": zeros, "HAS_OFFSETS": not zeros, "HAS_HALVES": halves, "SPLIT": split},
            **{"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64 if halves else 128},
        },
        num_warps=4,
        num_stages=num_stages(block_m, bits),
    )


def widen(bits: int) -> Variant:
    return Variant(
        f"{_QUANTIZED}:_widen_kernel",
        {
            **{"codes_ptr": "*i16" if bits == 4 else "*i8", "scales_ptr": "*bf16", "zeros_ptr": "*i16"},
            **{"offsets_ptr": "*fp32", "weight_ptr": "*bf16", "out_features": "i32:16", "in_features": "i32:16"},
            **{"code_stride": "i32:16", "num_groups": "i32:16", "group_size": "i32:16"},
        },
        {"BITS": bits, "HAS_ZEROS": True, "HAS_OFFSETS": False, "BLOCK_N": 32},
    )


def grouped(which: str, block_m: int) -> Variant:
    tiles = TILES[block_m]
    block_n, block_k, num_warps, num_stages = tiles.up if which == "up" else tiles.down
    constexprs: dict[str, Any] = {
        **{"IS_ONE_TOKEN": False, "HAS_BIAS": True, "EVEN_K": True, "UPCAST": False},
        **{"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k},
    }
    signature = {**_GROUPED, "inner_ptr": "*bf16"}
    if which == "up":
        constexprs |= {"NUM_CHOSEN": 8, "ACT": 2}
        signature |= {"x_ptr": "*bf16", "x_stride": "i32:16", "alpha": "fp32", "limit": "fp32"}
    else:
        signature |= {"said_ptr": "*bf16"}
    return Variant(f"{_MIXTURE}:_{which}_kernel", signature, constexprs, num_warps=num_warps, num_stages=num_stages)


VARIANTS: dict[str, Variant] = {
    "skinny": skinny(split=False),
    "skinny, split": skinny(split=True),
    "sum of parts": Variant(
        f"{_LINEAR}:_sum_parts_kernel",
        {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "size": "i32", "out_features": "i32"},
        {"HAS_BIAS": True, "SPLIT_K": 4, "BLOCK": 256},
    ),
    "deterministic": deterministic(),
    **{f"{bits} bits, {block_m} rows": codes(bits, block_m) for bits in (4, 8) for block_m in (16, 32, 64)},
    **{f"{bits} bits, 16 rows, split": codes(bits, 16, split=True) for bits in (4, 8)},
    **{f"{bits} bits, 64 rows, float16": codes(bits, 64, dtype="fp16") for bits in (4, 8)},
    "4 bits, groups of 32": codes(4, 16, halves=True),
    "4 bits, offsets": codes(4, 64, halves=True, zeros=False),
    **{f"widen {bits} bits": widen(bits) for bits in (4, 8)},
    "route": Variant(
        f"{_GROUPS}:_route_kernel",
        {
            **{"logits_ptr": "*bf16", "weights_ptr": "*fp32", "chosen_ptr": "*i32"},
            **{"num_tokens": "i32", "num_experts": "i32:16", "stride": "i32:16"},
        },
        {
            **{"OF_CHOSEN": False, "NORMALIZES": True, "NUM_CHOSEN": 8, "EXPERTS": 128, "PLACES": 8},
            "TOKENS": 4,
        },
    ),
    "count": Variant(
        f"{_GROUPS}:_count_kernel",
        {
            **{"chosen_ptr": "*i32", "counts_ptr": "*i32", "num_pairs": "i32", "pairs_per_segment": "i32:16"},
            **{"first": "i32", "num_experts": "i32:16"},
        },
        {"AT_ONCE": 1024},
    ),
    **{
        f"group, one {is_one}": Variant(
            f"{_GROUPS}:_group_kernel",
            {
                **{"chosen_ptr": "*i32", "counts_ptr": "*i32", "pairs_ptr": "*i32", "experts_ptr": "*i32"},
                **{"num_pairs": "i32", "pairs_per_segment": "i32:16", "num_segments": "i32", "first": "i32"},
                **{"num_experts": "i32:16", "max_blocks": "i32"},
            },
            {
                **{"IS_ONE": is_one, "SEGMENTS": 16, "EXPERTS": 256, "BLOCK_M": 16},
                "AT_ONCE": 1024,
            },
        )
        for is_one in (True, False)
    },
    **{f"{which} {block_m}": grouped(which, block_m) for which in ("up", "down") for block_m in TILES},
    "combine": Variant(
        f"{_MIXTURE}:_combine_kernel",
        {
            **{"said_ptr": "*bf16", "weights_ptr": "*fp32", "chosen_ptr": "*i32", "out_ptr": "*bf16"},
            **{"first": "i32", "num_experts": "i32:16", "hidden_size": "i32:16"},
        },
        {"NUM_CHOSEN": 8, "BLOCK": 1024},
    ),
}
WITH_WARP_GROUPS = ("deterministic", "up 64", "up 128", "down 64", "down 128")
STREAMING = ("skinny", "skinny, split", "up 16", "down 16", "up 32", "down 32")


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return dict(zip(VARIANTS, compile_all(list(VARIANTS.values())), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_spilt_and_the_shared_memory_suffices(name: str, reports: dict[str, Report]) -> None:
    assert reports[name].spills == 0
    assert reports[name].shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("name", WITH_WARP_GROUPS)
def test_products_of_many_rows_are_done_by_warp_groups(name: str, reports: dict[str, Report]) -> None:
    assert reports[name].uses_wgmma


@pytest.mark.parametrize("name", STREAMING)
def test_products_of_few_rows_stream_their_weights_past_the_registers(name: str, reports: dict[str, Report]) -> None:
    """Sixteen bytes at a time, several tiles ahead of the tensor cores."""
    assert "cp.async.cg.shared.global" in reports[name].ptx
    assert "mma.sync" in reports[name].ptx


@pytest.mark.parametrize("name", ["combine", "sum of parts", "up 16", "down 128", "group, one False"])
def test_no_float_is_added_atomically(name: str, reports: dict[str, Report]) -> None:
    assert "red.global.add.f" not in reports[name].ptx and "atom.global.add.f" not in reports[name].ptx
