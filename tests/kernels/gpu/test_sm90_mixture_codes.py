"""What the compiler makes of the products with experts' codes for Hopper: warp groups, weights from registers."""

from __future__ import annotations

from typing import Any

import pytest
from sm90 import MAX_SHARED_BYTES, Report, Variant, compile_all

from octavo.kernels.gpu.mixture_tiles import CODE_TILES

_SIGNATURE = {
    **{"bias_ptr": "*bf16", "pairs_ptr": "*i32", "experts_ptr": "*i32", "num_pairs": "i32", "first": "i32"},
    **{"num_experts": "i32", "hidden_size": "i32:16", "inner": "i32:16"},
    **{"num_units": "i32", "num_groups": "i32", "group_size": "i32:16"},
}


def coded(which: str, block_m: int, *, bits: int, is_mxfp4: bool = False, dtype: str = "bf16") -> Variant:
    tiles = CODE_TILES[block_m]
    block_n, num_warps, num_stages = tiles.up if which == "up" else tiles.down
    constexprs: dict[str, Any] = {
        **{"IS_ONE_TOKEN": False, "HAS_BIAS": True, "HAS_ZEROS": not is_mxfp4, "IS_MXFP4": is_mxfp4},
        # As for GPT-OSS: 2880 inputs are whole units of 32, and not of 128.
        **{"BITS": bits, "PARTS": 4 if bits == 4 else 1, "EVEN_K": bits == 8, "UPCAST": False},
        **{"BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    signature = {
        **_SIGNATURE,
        **{"bias_ptr": f"*{dtype}", "inner_ptr": f"*{dtype}", "codes_ptr": "*i16" if bits == 4 else "*i8"},
        "scales_ptr": "*i32" if is_mxfp4 else "*bf16",
    }
    if is_mxfp4:
        constexprs["zeros_ptr"] = None
    else:
        signature["zeros_ptr"] = "*i16"
    if which == "up":
        constexprs |= {"NUM_CHOSEN": 4, "ACT": 2}
        signature |= {"x_ptr": f"*{dtype}", "x_stride": "i32:16", "alpha": "fp32", "limit": "fp32"}
    else:
        signature |= {"said_ptr": f"*{dtype}"}
    kernel = f"octavo.kernels.gpu.mixture_codes:_codes_{which}_kernel"
    return Variant(kernel, signature, constexprs, num_warps=num_warps, num_stages=num_stages)


VARIANTS: dict[str, Variant] = {
    **{
        f"mxfp4, {which} {block_m}": coded(which, block_m, bits=4, is_mxfp4=True)
        for which in ("up", "down")
        for block_m in CODE_TILES
    },
    "mxfp4, up 64, float16": coded("up", 64, bits=4, is_mxfp4=True, dtype="fp16"),
    **{
        f"{bits} bits, {which} {block_m}": coded(which, block_m, bits=bits)
        for bits in (4, 8)
        for which, block_m in (("up", 16), ("up", 128), ("down", 64))
    },
}


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return dict(zip(VARIANTS, compile_all(list(VARIANTS.values())), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_spilt_and_the_shared_memory_suffices(name: str, reports: dict[str, Report]) -> None:
    assert reports[name].spills == 0
    assert reports[name].shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("name", VARIANTS)
def test_any_number_of_rows_is_multiplied_by_warp_groups(name: str, reports: dict[str, Report]) -> None:
    assert reports[name].uses_wgmma


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("8 bits")])
def test_codes_of_4_bits_stream_past_the_registers_and_lie_as_the_tensor_cores_want_them(
    name: str, reports: dict[str, Report]
) -> None:
    """Sixteen bytes at a time, several units ahead."""
    assert "cp.async.cg.shared.global" in reports[name].ptx
    assert "ldmatrix" in reports[name].ptx


@pytest.mark.parametrize("name", VARIANTS)
def test_no_subnormal_number_is_flushed(name: str, reports: dict[str, Report]) -> None:
    """As MXFP4's codes are some, where a bfloat16 is made of their bits."""
    assert not [line for line in reports[name].ptx.splitlines() if "mul" in line and ".ftz" in line]
