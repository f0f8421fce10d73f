"""What the compiler makes of the products with 8-bit floats for Hopper: warp groups that multiply them as they are."""

from __future__ import annotations

import pytest
from sm90 import MAX_SHARED_BYTES, Report, Variant, compile_all

from octavo.kernels.gpu.linear_fp8 import LARGE, SMALL, WIDE, TilePlan
from octavo.kernels.gpu.linear_fp8_skinny import num_stages

_PRODUCTS, _ROUNDING = "octavo.kernels.gpu.linear_fp8", "octavo.kernels.gpu.round_inputs"
_FEW_ROWS = "octavo.kernels.gpu.linear_fp8_skinny"
_SIZES = {"num_rows": "i32", "out_features": "i32:16", "in_features": "i32:16"}


def tiles(plan: TilePlan, *, by_group: bool, rows_per_scale: int, dtype: str = "bf16") -> Variant:
    return Variant(
        f"{_PRODUCTS}:_tiles_kernel",
        {
            **{"x_ptr": "*fp8e4nv", "x_scales_ptr": "*fp32", "weight_ptr": "*fp8e4nv", "weight_scales_ptr": "*fp32"},
            **{"out_ptr": f"*{dtype}", **_SIZES, "num_groups": "i32:16"},
        },
        {
            **{"BY_GROUP": by_group, "ROWS_PER_SCALE": rows_per_scale, "EVEN_K": True, "UPCAST": False},
            **{"WIDE": plan.is_wide, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_K": 128, "TURN": 8},
        },
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


def skinny(block_m: int, *, by_group: bool = True, split: bool = False, dtype: str = "bf16") -> Variant:
    return Variant(
        f"{_FEW_ROWS}:_fp8_skinny_kernel",
        {
            **{"x_ptr": f"*{dtype}", "weight_ptr": "*fp8e4nv", "scales_ptr": "*fp32", **_SIZES, "x_stride": "i32:16"},
            **{"out_ptr": "*fp32" if split else f"*{dtype}", "num_groups": "i32:16", "rows_per_scale": "i32:16"},
            "inputs_per_split": "i32:16",
        },
        {
            **{"BY_GROUP": by_group, "SPLIT": split, "EVEN_K": True, "UPCAST": False},
            **{"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 128},
        },
        num_warps=4,
        num_stages=num_stages(block_m),
    )


def rounding(*, static: bool) -> Variant:
    return Variant(
        f"{_ROUNDING}:_round_groups_kernel",
        {
            **{"x_ptr": "*bf16", "codes_ptr": "*u8", "scales_ptr": "*fp32", "input_scale_ptr": "*fp32"},
            **{"num_rows": "i32", "in_features": "i32:16", "num_groups": "i32:16", "x_stride": "i32:16"},
        },
        {"STATIC": static, "GROUPS": 16, "WIDTH": 128},
    )


TILES = {
    "wide, rows": tiles(WIDE, by_group=False, rows_per_scale=1),
    "large, blocks": tiles(LARGE, by_group=True, rows_per_scale=128),
    "large, rows": tiles(LARGE, by_group=False, rows_per_scale=1),
    "large, rows, float16": tiles(LARGE, by_group=False, rows_per_scale=1, dtype="fp16"),
    "small, blocks": tiles(SMALL, by_group=True, rows_per_scale=128),
    "small, blocks cut": tiles(SMALL, by_group=True, rows_per_scale=1),
    "small, rows": tiles(SMALL, by_group=False, rows_per_scale=1),
}
SKINNY = {
    **{f"skinny {block_m}": skinny(block_m) for block_m in (16, 32, 64)},
    "skinny 16, rows": skinny(16, by_group=False),
    "skinny 16, split": skinny(16, split=True),
    "skinny 64, float16": skinny(64, dtype="fp16"),
}
VARIANTS: dict[str, Variant] = {
    **TILES,
    **SKINNY,
    "round groups": rounding(static=False),
    "round by a scale of all": rounding(static=True),
    "round rows": Variant(
        f"{_ROUNDING}:_round_rows_kernel",
        {
            **{"x_ptr": "*bf16", "codes_ptr": "*u8", "scales_ptr": "*fp32"},
            **{"in_features": "i32:16", "x_stride": "i32:16"},
        },
        {"WIDTH": 2048},
    ),
}


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return dict(zip(VARIANTS, compile_all(list(VARIANTS.values())), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_spilt_and_the_shared_memory_suffices(name: str, reports: dict[str, Report]) -> None:
    assert reports[name].spills == 0
    assert reports[name].shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("name", TILES)
def test_products_of_many_rows_multiply_8_bits_by_8_in_warp_groups(name: str, reports: dict[str, Report]) -> None:
    ptx = reports[name].ptx
    products = [line for line in ptx.splitlines() if "wgmma.mma_async" in line]
    assert products and all(".f32.e4m3.e4m3" in line for line in products)
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("name", TILES)
def test_no_more_than_128_inputs_are_added_up_in_the_tensor_cores(name: str, reports: dict[str, Report]) -> None:
    """A product begins from zeros: else its accumulator, of some 14 bits, would be carried through the loop."""
    dots = [line for line in reports[name].ttgir.splitlines() if "ttng.warp_group_dot " in line]
    assert dots and all("%cst" in line.split("warp_group_dot ")[1].split("{")[0] for line in dots)


@pytest.mark.parametrize("name", SKINNY)
def test_products_of_few_rows_stream_8_bits_a_weight_and_widen_them_in_registers(
    name: str, reports: dict[str, Report]
) -> None:
    ptx, ttgir = reports[name].ptx, reports[name].ttgir
    assert "cvt.rn.f16x2.e4m3x2" in ptx
    assert "cp.async.cg.shared.global" in ptx  # 16 bytes at a time
    copies = [line for line in ttgir.splitlines() if "async_copy_global_to_local" in line and "f8E4M3FN" in line]
    assert len(copies) >= 2  # those before the loop, and that within


@pytest.mark.parametrize("name", ["large, blocks", "skinny 16"])
def test_the_scales_of_the_next_group_are_asked_for_before_this_one_is_multiplied(
    name: str, reports: dict[str, Report]
) -> None:
    lines = reports[name].ttgir.splitlines()
    dots = [at for at, line in enumerate(lines) if "ttng.warp_group_dot " in line or "tt.dot " in line]
    loop = next(at for at, line in enumerate(lines) if "scf.for" in line)
    loads = [at for at, line in enumerate(lines) if "tt.load" in line and "next_" in line]
    assert loads and all(loop < at < dots[0] for at in loads)
