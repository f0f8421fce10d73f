"""What the compiler makes of paged attention for Hopper, as it would be launched there: no GPU is needed to see it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
from sm90 import MAX_SHARED_BYTES, Report, Variant, compile_all

from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.attention_kind import AttentionKind
from octavo.kernels.gpu import paged_attention as module
from octavo.kernels.kv_quantization import row_width

PROCESSORS = 132  # of an H200
REGISTERS_OF_A_PROCESSOR = 65536
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


class Launches:
    """Takes a kernel's place and notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.arguments = list(inspect.signature(kernel.fn).parameters)
        self.name = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
        self.variants: list[Variant] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(
        self, *args: Any, num_warps: int, num_stages: int = 3, enable_fp_fusion: bool = True, **constexprs: Any
    ) -> None:
        signature = {}
        for name, value in zip(self.arguments, args, strict=False):
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:  # strides of queries and outputs are specialised, as at launch; nothing else is
                aligned = "stride" in name and name != "table_stride" and value % 16 == 0
                signature[name] = "i32:16" if aligned else "i32"
        constexprs["S"] = dataclasses.replace(constexprs["S"], UPCAST=False)
        self.variants.append(Variant(self.name, signature, constexprs, num_warps, num_stages, enable_fp_fusion))


def launched(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    query_len: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    q_dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
    num_rows: int = 256,
    num_kv_heads: int = 8,
    context_len: int = 4096,
    batch_invariant: bool = False,
    **options: Any,
) -> tuple[Variant, ...]:
    """The kernels of one call with 32 heads: the main one, and a reduction if there is one.

    Args:
        dtype, q_dtype: of the cache, and of the queries.
        query_len, context_len: of each row.
        options: of the attention.
    """
    names = ("share_kernel", "tile_kernel", "reduce_shares_kernel", "reduce_chunks_kernel")
    kernels = [Launches(getattr(module, name)) for name in names]
    with monkeypatch.context() as patch:
        for name, kernel in zip(names, kernels, strict=True):
            patch.setattr(module, name, kernel)
        patch.setattr(module, "num_processors", lambda device: PROCESSORS)
        meta = {"device": "meta"}
        cache = torch.empty(64, num_kv_heads, block_size, row_width(head_dim, dtype), dtype=dtype, **meta)
        batch = AttentionBatch(
            query_start=torch.empty(num_rows + 1, dtype=torch.int32, **meta),
            context_lens=torch.empty(num_rows, dtype=torch.int32, **meta),
            block_tables=torch.empty(num_rows, 64, dtype=torch.int32, **meta),
            slot_mapping=torch.empty(num_rows * query_len, dtype=torch.int64, **meta),
            block_size=block_size,
            max_query_len=query_len,
            max_context_len=context_len,
            num_decodes=num_rows if query_len == 1 else 0,
        )
        q = torch.empty(num_rows * query_len, 32, head_dim, dtype=q_dtype, **meta)
        module.paged_attention(q, cache, cache, batch, AttentionKind(0.1, **options), batch_invariant=batch_invariant)
    return tuple(variant for kernel in kernels for variant in kernel.variants)


ALL_MASKS = {"sliding_window": 128, "softcap": 30.0, "sinks": torch.ones(32), "alibi_slopes": torch.ones(32)}
MASKS: dict[str, dict[str, Any]] = {  # as models have them
    "window and soft cap": {"sliding_window": 128, "softcap": 30.0},
    "window and sinks": {"sliding_window": 128, "sinks": torch.ones(32)},
    "ALiBi": {"alibi_slopes": torch.ones(32)},
}
CACHES: dict[str, dict[str, torch.dtype]] = {
    "bf16": {},
    "fp16": {"dtype": torch.float16, "q_dtype": torch.float16},
    "fp8": {"dtype": torch.float8_e4m3fn},
    "int8": {"dtype": torch.int8},
}
CALLS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "decode, 64 wide": (64, 1, {}),
    "decode": (128, 1, {}),
    "decode, 256 wide": (256, 1, {}),
    "decode, all masks": (128, 1, ALL_MASKS),
    "decode, fp8": (128, 1, CACHES["fp8"]),
    "prefill, 64 wide": (64, 512, {}),
    "prefill": (128, 512, {}),
    "prefill, blocks of 128": (128, 512, {"block_size": 128}),
    "prefill, 256 wide": (256, 512, {}),
    "prefill, fp8": (128, 512, CACHES["fp8"]),
    "prefill, batch-invariant": (128, 512, {"batch_invariant": True}),
    "prefill, all masks": (128, 512, ALL_MASKS),
    "prefill, 96 wide, blocks of 256": (96, 512, {"block_size": 256}),
    "decode, 80 wide, blocks of 256": (80, 1, {"block_size": 256}),
    "decode, int8": (128, 1, CACHES["int8"]),
    "prefill, int8": (128, 512, CACHES["int8"]),
    "prefill, float16": (128, 512, CACHES["fp16"]),
    "prefill, few rows, batch-invariant": (128, 256, {"num_rows": 1, "batch_invariant": True}),
    "decode, few rows, batch-invariant": (128, 1, {"num_rows": 1, "batch_invariant": True}),
    # Every mask at once is what takes most registers, and most of all beside codes that are widened.
    "decode, 112 wide, blocks of 32, int8, all masks": (112, 1, {"block_size": 32, **CACHES["int8"], **ALL_MASKS}),
    "decode of one KV head, 64 wide, blocks of 32, fp8, window": (
        64,
        1,
        {"block_size": 32, "num_kv_heads": 1, "sliding_window": 128, **CACHES["fp8"]},
    ),
    "prefill, batch-invariant, 256 wide, int8, all masks": (
        256,
        512,
        {"batch_invariant": True, **CACHES["int8"], **ALL_MASKS},
    ),
    **{
        f"short chunk, {kind}": (head_dim, query_len, {"num_rows": 1, "context_len": 32768, **options})
        for kind, head_dim, query_len, options in (
            ("16 tokens", 128, 16, {}),
            ("64 tokens", 128, 64, {}),
            ("fp8", 128, 64, CACHES["fp8"]),
            ("all masks", 128, 64, ALL_MASKS),
        )
    },
}
BY_SHARE = ("decode", "short chunk")

# What the executor can choose, beside the above: every kind of launch with every width, cache, mask and size of blocks.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "decode": (1, {}),
    "decode of one KV head": (1, {"num_kv_heads": 1}),
    "prefill": (512, {}),
    "short chunk": (64, {"num_rows": 1, "context_len": 32768}),
    "prefill, batch-invariant": (512, {"batch_invariant": True}),
    "decode, few rows, batch-invariant": (1, {"num_rows": 1, "batch_invariant": True}),
}
COVERED = (
    (64, 256, "fp8", "window and sinks"),
    (112, 32, "int8", "ALiBi"),
    (128, 128, "fp8", "window and soft cap"),
    (192, 64, "bf16", "window and sinks"),
    (256, 16, "bf16", "window and soft cap"),
    (256, 256, "fp8", "window and soft cap"),
)
CALLS |= {
    f"{kind}, {head_dim} wide, blocks of {block_size}, {cache}, {masks}": (
        head_dim,
        query_len,
        {"block_size": block_size, **options, **CACHES[cache], **MASKS[masks]},
    )
    for kind, (query_len, options) in KINDS.items()
    for head_dim, block_size, cache, masks in COVERED
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[tuple[Variant, Report], ...]]:
    """The kernels of each call; what several have in common is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        calls = {name: launched(patch, width, length, **options) for name, (width, length, options) in CALLS.items()}
    variants = {repr(variant): variant for launches in calls.values() for variant in launches}
    found = dict(zip(variants, compile_all(list(variants.values()), timeout_s=1800), strict=True))
    return {name: tuple((each, found[repr(each)]) for each in launches) for name, launches in calls.items()}


@pytest.fixture(scope="module")
def reports(compiled: dict[str, tuple[tuple[Variant, Report], ...]]) -> dict[str, tuple[Variant, Report]]:
    """The main kernel of each call."""
    return {name: launches[0] for name, launches in compiled.items()}


def test_whatever_has_sixty_four_rows_uses_wgmma(reports: dict[str, tuple[Variant, Report]]) -> None:
    """That is every prefill, every short chunk and whatever promises its bits, however wide its heads are."""
    for name, (variant, report) in reports.items():
        is_by_tile = not name.startswith(BY_SHARE) or "batch-invariant" in name
        assert variant.kernel.endswith("tile_kernel") == is_by_tile, name
        has_many_rows = variant.constexprs["S"].BLOCK_M >= 64
        assert has_many_rows == (is_by_tile or name.startswith("short chunk")), name
        assert report.uses_wgmma == has_many_rows, name


def test_short_chunks_of_long_prompts_are_computed_sixty_four_rows_at_a_time(
    reports: dict[str, tuple[Variant, Report]],
) -> None:
    chunks = {name: variant for name, (variant, _) in reports.items() if name.startswith("short chunk")}
    assert {variant.constexprs["S"].BLOCK_M for variant in chunks.values()} == {64}


def test_what_is_split_for_few_rows_whatever_the_batch_is_among_what_is_compiled(
    reports: dict[str, tuple[Variant, Report]],
) -> None:
    split = {name for name, (variant, _) in reports.items() if variant.constexprs.get("SPLIT")}
    assert split == {name for name in reports if "few rows, batch-invariant" in name}


def test_no_kernel_of_a_call_spills(compiled: dict[str, tuple[tuple[Variant, Report], ...]]) -> None:
    spills = {name: sum(report.spills for _, report in launches) for name, launches in compiled.items()}
    assert {name: count for name, count in spills.items() if count} == {}


def test_what_is_cut_is_reduced_by_another_kernel(compiled: dict[str, tuple[tuple[Variant, Report], ...]]) -> None:
    for name, launches in compiled.items():
        is_cut = name.startswith(BY_SHARE) or "few rows" in name
        assert [each.kernel.rpartition("reduce_")[0] != "" for each, _ in launches] == [False, True][: 1 + is_cut], name


def test_shared_memory_fits(compiled: dict[str, tuple[tuple[Variant, Report], ...]]) -> None:
    for name, launches in compiled.items():
        assert max(report.shared_bytes for _, report in launches) <= MAX_SHARED_BYTES, name


def makers_of_exponents(ptx: str) -> set[str]:
    """Instructions whose results exponentials are taken of."""
    makers = {into: name for name, into in re.findall(r"^\s*([a-z][\w.]+)\s+(%\w+),", ptx, re.MULTILINE)}
    return {makers[exponent] for exponent in re.findall(r"ex2\.approx[\w.]*\s+%\w+, (%\w+);", ptx)}


def test_logits_are_rounded_alike_with_and_without_a_mask_where_bits_are_promised(
    reports: dict[str, tuple[Variant, Report]],
) -> None:
    """Where they are scaled before the maximum is known, nothing of that is fused with what comes after."""
    num_found = 0
    for name, (variant, report) in reports.items():
        tiling = variant.constexprs["S"]
        is_scaled_first = tiling.SOFTCAP or tiling.ALIBI or tiling.QUANTIZED
        if "batch-invariant" in name and is_scaled_first:
            num_found += 1
            assert "sub" in {maker.split(".")[0] for maker in makers_of_exponents(report.ptx)}, name
            assert "fma" not in {maker.split(".")[0] for maker in makers_of_exponents(report.ptx)}, name
    assert num_found > 8


def test_a_processor_holds_as_many_programs_by_share_as_are_launched_for_it(
    reports: dict[str, tuple[Variant, Report]],
) -> None:
    for name, (variant, report) in reports.items():
        if variant.kernel.endswith("share_kernel"):
            count = 8 // variant.num_warps
            registers = -(-report.num_registers // 8) * 8 * 32 * variant.num_warps
            assert count * registers <= REGISTERS_OF_A_PROCESSOR, name
            assert count * (report.shared_bytes + 1024) <= MAX_SHARED_BYTES + 1024, name  # 1 KiB is the system's


def test_keys_and_values_are_copied_sixteen_bytes_at_a_time(reports: dict[str, tuple[Variant, Report]]) -> None:
    for name, (_, report) in reports.items():
        wide, narrow = report.ptx.count(", 0x10"), report.ptx.count(", 0x4,")
        if "fp8" not in name and "int8" not in name:  # whose rows of 132 bytes are aligned to four
            assert wide >= 16, name
            assert narrow == 0, name
