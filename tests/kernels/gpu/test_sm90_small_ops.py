"""The small kernels compiled for Hopper without a GPU: nothing is spilled, and loads are as wide as they should be."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from sm90 import Report, Variant, compile_all

import octavo.kernels.gpu
from octavo.kernels.gpu.rms_norm import MAX_HIDDEN_SIZE, num_warps_of
from octavo.kernels.step_layout import MAX_EDITS, StepLayout

PACKAGE = "octavo.kernels.gpu."
SIZES = {"stride": "i32:16", "vocab_size": "i32:16", "num_chunks": "i32"}
ROW = {"temperature_ptr": "*fp32", "top_k_ptr": "*i32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32"}
STATS = {"chunk_max_ptr": "*fp32", "chunk_sum_ptr": "*fp64"}
UNIT = float(1 << 44)
FILTER = {
    "window_ptr": "*fp32",
    "above_ptr": "*i64",
    "kept_ptr": "*i64",
    "count_ptr": "*i32",
    "values_ptr": "*fp32",
    "columns_ptr": "*i32",
}


def rotary(
    cache: str | None,
    *,
    fp8: bool = False,
    quantized: bool = False,
    head_dim: int = 128,
    rotary_dim: int | None = None,
    heads: int | None = None,
    has_norm: bool = True,
) -> Variant:
    """Qwen3's heads, their norm, and a cache, or others.

    Args:
        cache: type of its numbers; None: no cache.
        heads: of a program; None: as many as it takes.
    """
    rotary_dim = rotary_dim or head_dim
    width = 1 << (head_dim - 1).bit_length()
    strides = {f"{x}_stride_{axis}": "i32:16" for x in "qkv" for axis in ("token", "head")}
    norm, caches = ("q_weight_ptr", "k_weight_ptr"), ("k_cache_ptr", "v_cache_ptr")
    return Variant(
        PACKAGE + "rotary:_rotary_kernel",
        {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", *(norm if has_norm else ())), "*bf16"),
            **{"cos_sin_ptr": "*fp32", "positions_ptr": "*i64"},
            **({"slots_ptr": "*i64", **dict.fromkeys(caches, cache)} if cache else {}),
            **strides,
            **dict.fromkeys(("num_heads", "block_size", "num_slots", "max_position"), "i32:16"),
            "num_kv_heads": "i32",
            "eps": "fp32",
        },
        {
            **{"HEAD_DIM": head_dim, "ROTARY_DIM": rotary_dim, "V_HEAD_DIM": head_dim, "HEADS": heads or 1024 // width},
            **{"HALF": 1 << (rotary_dim // 2 - 1).bit_length(), "V_BLOCK": width, "FP8": fp8, "QUANTIZED": quantized},
            "REST": 1 << (head_dim - rotary_dim - 1).bit_length() if rotary_dim < head_dim else 0,
            **({} if has_norm else dict.fromkeys(norm)),
            **({} if cache else dict.fromkeys(("slots_ptr", *caches))),
        },
        num_warps=4,
    )


def kv_write(cache: str, *, fp8: bool = False, quantized: bool = False) -> Variant:
    return Variant(
        PACKAGE + "kv_write:write_kv_kernel",
        {
            **{"k_ptr": "*bf16", "v_ptr": "*bf16", "k_cache_ptr": cache, "v_cache_ptr": cache, "slots_ptr": "*i64"},
            **{f"{x}_stride_{axis}": "i32:16" for x in "kv" for axis in ("token", "head")},
        },
        {
            **{"HEADS": 8, "HEAD_BLOCK": 8, "BLOCK_SIZE": 16, "K_DIM": 128, "K_BLOCK": 128, "V_DIM": 128},
            **{"V_BLOCK": 128, "FP8": fp8, "QUANTIZED": quantized},
        },
    )


def rms_norm(block: int, *, has_residual: bool = True) -> Variant:
    return Variant(
        PACKAGE + "rms_norm:_rms_norm_kernel",
        {
            **dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr", *(("residual_ptr",) if has_residual else ())), "*bf16"),
            **dict.fromkeys(("x_stride", "residual_stride", "hidden_size"), "i32:16"),
            "eps": "fp32",
        },
        {"BLOCK": block, **({} if has_residual else {"residual_ptr": None})},
        num_warps=num_warps_of(block),
    )


def stats(**none: None) -> Variant:
    """Args: none: what a launch leaves out."""
    signature = {
        **{"logits_ptr": "*fp32", "temperature_ptr": "*fp32", "token_ids_ptr": "*i64", **STATS},
        **{"chunk_best_ptr": "*i32", "group_max_ptr": "*fp32", "count_ptr": "*i32", **SIZES},
    }
    return Variant(
        PACKAGE + "sampling_stats:stats_kernel",
        {name: kind for name, kind in signature.items() if name not in none},
        {**none, "CHUNK": 2048, "GROUP": 64},
        num_warps=4,
    )


def choose(*, filtered: bool) -> Variant:
    return Variant(
        PACKAGE + "sampling_choose:choose_kernel",
        {
            **{"logits_ptr": "*fp32", **ROW, "seeds_ptr": "*i64", "positions_ptr": "*i64", **STATS},
            **{"chunk_best_ptr": "*i32", "out_ptr": "*i64", **SIZES},
            **(FILTER if filtered else {}),
        },
        {
            **{"CHUNK": 2048, "CHUNKS": 128, "CAPACITY": 8192, "UNIT": UNIT},
            **({} if filtered else dict.fromkeys(FILTER)),
        },
        num_warps=8,
    )


LAYOUT = StepLayout(256, 4096, 16)
STEP = PACKAGE + "step_inputs:"
STATE = {"state_ptr": "*i32", "packed_ptr": "*i32"}
SAMPLES = {
    **{"ROW_WORDS": LAYOUT.row_words, "SAMPLE_ROWS": LAYOUT.sample_rows, "SAMPLE_COLUMNS": LAYOUT.sample_columns},
    "TOKEN_IDS": LAYOUT.token_ids,
}


VARIANTS = {
    "apply_diff": Variant(
        STEP + "_apply_diff_kernel",
        STATE,
        {
            **{"ROW_WORDS": LAYOUT.row_words, "NUM_PIECES": LAYOUT.num_pieces, "DIFF": LAYOUT.diff},
            **{"ENTRY_WORDS": 4, "BLOCK": 1024},
        },
    ),
    "gather_step": Variant(
        STEP + "_gather_step_kernel",
        {
            **STATE,
            **dict.fromkeys(("input_ids_ptr", "positions_ptr", "slot_mapping_ptr"), "*i64"),
            **dict.fromkeys(("block_tables_ptr", "top_k_ptr"), "*i32"),
            **dict.fromkeys(("temperature_ptr", "top_p_ptr", "min_p_ptr"), "*fp32"),
            **dict.fromkeys(("seeds_ptr", "draw_positions_ptr"), "*i64"),
            "num_tokens": "i32",
        },
        {
            **SAMPLES,
            **{"ROWS": LAYOUT.rows, "STARTS": LAYOUT.starts, "QUERY_START": LAYOUT.query_start},
            **{"CONTEXT_LENS": LAYOUT.context_lens, "BLOCKS": LAYOUT.blocks, "MAX_BLOCKS": LAYOUT.max_blocks},
            **{"BLOCK_SIZE": 16, "BLOCK": 256},
        },
    ),
    "append_tokens": Variant(
        STEP + "_append_tokens_kernel",
        {**STATE, "token_ids_ptr": "*i64", "num_samples": "i32"},
        {**SAMPLES, "BLOCK": 128},
    ),
    "logit_processing": Variant(
        PACKAGE + "logit_processing:_process_logits_kernel",
        {
            **{"logits_ptr": "*fp32", **STATE, "counts_ptr": "*i32"},
            **{"num_samples": "i32", "stride": "i32:16", "vocab_size": "i32:16"},
        },
        {
            **{**SAMPLES, "EDITS": LAYOUT.edits, "MAX_EDITS": MAX_EDITS, "BLOCK": 1024},
        },
        num_warps=8,
    ),
    "rms_norm": rms_norm(4096),
    "rms_norm, no residual": rms_norm(1024, has_residual=False),
    "rms_norm, widest": rms_norm(MAX_HIDDEN_SIZE),
    "silu_and_mul": Variant(
        PACKAGE + "gated_activation:_gated_activation_kernel",
        {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "stride": "i32:16", "intermediate_size": "i32:16"},
        {"GELU": False, "BLOCK": 1024},
        num_warps=4,
    ),
    "gelu_tanh_and_mul": Variant(
        PACKAGE + "gated_activation:_gated_activation_kernel",
        {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "stride": "i32:16", "intermediate_size": "i32:16"},
        {"GELU": True, "BLOCK": 1024},
        num_warps=4,
    ),
    "embedding": Variant(
        PACKAGE + "embedding:_embed_kernel",
        {
            **{"ids_ptr": "*i64", "weight_ptr": "*bf16", "out_ptr": "*bf16"},
            **dict.fromkeys(("weight_stride", "vocab_size", "hidden_size"), "i32:16"),
        },
        {"BLOCK": 1024},
        num_warps=4,
    ),
    "kv_write": kv_write("*bf16"),
    "kv_write_fp8": kv_write("*u8", fp8=True, quantized=True),
    "kv_write_int8": kv_write("*u8", quantized=True),
    "rotary": rotary("*bf16"),
    "rotary_fp8": rotary("*u8", fp8=True, quantized=True),
    "rotary_int8": rotary("*u8", quantized=True),
    "rotary, 64 wide, no norm": rotary("*bf16", head_dim=64, has_norm=False),
    "rotary, 256 wide, fp8": rotary("*u8", head_dim=256, fp8=True, quantized=True),
    "rotary, a part turned": rotary("*bf16", rotary_dim=64),
    "rotary, a part turned, fp8": rotary("*u8", head_dim=80, rotary_dim=32, has_norm=False, fp8=True, quantized=True),
    "rotary, no cache": rotary(None),
    "rotary, few heads": rotary("*bf16", head_dim=16, heads=2, has_norm=False),
    "stats": stats(token_ids_ptr=None),
    "stats, nothing filtered": stats(token_ids_ptr=None, group_max_ptr=None, count_ptr=None),
    "stats, of tokens": stats(temperature_ptr=None, count_ptr=None),
    "logprobs": Variant(
        PACKAGE + "logprobs:_logprobs_kernel",
        {
            **{"logits_ptr": "*fp32", "token_ids_ptr": "*i64", **STATS, "chunk_larger_ptr": "*i32"},
            **{"group_max_ptr": "*fp32", "logprob_ptr": "*fp32", "rank_ptr": "*i64", "top_ids_ptr": "*i64"},
            **{"top_logprobs_ptr": "*fp32", **SIZES, "num_groups": "i32:16", "num_top": "i32"},
        },
        {"CHUNKS": 128, "GROUPS": 4096, "GROUP": 64},
        num_warps=8,
    ),
    "bracket": Variant(
        PACKAGE + "sampling_window:bracket_kernel",
        {
            **{"logits_ptr": "*fp32", **ROW, **STATS, "group_max_ptr": "*fp32", "window_ptr": "*fp32", **SIZES},
            "num_groups": "i32:16",
        },
        {"CHUNKS": 128, "GROUPS": 4096, "GROUP": 64, "SAMPLE": 8192, "CAPACITY": 8192},
        num_warps=16,
    ),
    "collect": Variant(
        PACKAGE + "sampling_window:collect_kernel",
        {
            **{"logits_ptr": "*fp32", "temperature_ptr": "*fp32", "min_p_ptr": "*fp32", "chunk_max_ptr": "*fp32"},
            **{**FILTER, **SIZES},
        },
        {"CHUNK": 2048, "CHUNKS": 128, "CAPACITY": 8192, "UNIT": UNIT},
        num_warps=8,
    ),
    "choose": choose(filtered=False),
    "choose_filtered": choose(filtered=True),
}


@functools.cache
def reports() -> dict[str, Report]:
    return dict(zip(VARIANTS, compile_all(list(VARIANTS.values())), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_spilled(name: str) -> None:
    report = reports()[name]
    assert report.spills == 0


@pytest.mark.parametrize("name", ["stats", "bracket", "collect"])
def test_what_reads_whole_rows_shares_a_processor_with_itself(name: str) -> None:
    registers = reports()[name].num_registers * VARIANTS[name].num_warps * 32
    assert 2 * registers <= 65_536


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("rms_norm", "v4.b32"),
        ("silu_and_mul", "v4.b32"),
        ("embedding", "v4.b32"),
        ("stats", "v4.b32"),
        ("collect", "v4.b32"),
    ],
)
def test_rows_are_read_sixteen_bytes_at_a_time(name: str, width: str) -> None:
    assert f"ld.global.{width}" in reports()[name].ptx


def test_what_turns_in_place_is_loaded_by_all_threads_before_one_stores() -> None:
    """Of few heads several threads hold the same numbers."""
    before, *_ = reports()["rotary, few heads"].ptx.split("st.global")
    assert "bar.sync" in before[before.rindex("ld.global") :]


def test_every_kernel_is_compiled_for_hopper_in_some_test() -> None:
    kernels = {
        name
        for path in Path(octavo.kernels.gpu.__file__).parent.glob("*.py")
        if not path.name.startswith(("bench_", "mixture"))  # whose tests name two at a time
        for name in re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text())
    }
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_sm90_*.py"))
    assert len(kernels) > 15
    assert [name for name in sorted(kernels) if name not in tests] == []
