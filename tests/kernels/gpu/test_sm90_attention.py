"""What the compiler makes of paged attention for Hopper, as it would be launched there: no GPU is needed to see it."""

from __future__ import annotations

import dataclasses
import inspect
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

    def __init__(self, kernel: Any, name: str) -> None:
        self.arguments = list(inspect.signature(kernel.fn).parameters)
        self.name = name
        self.variants: list[Variant] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *args: Any, num_warps: int, num_stages: int = 0, **constexprs: Any) -> None:
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
        self.variants.append(
            Variant(f"octavo.kernels.gpu.attention_kernels:{self.name}", signature, constexprs, num_warps, num_stages)
        )


def launched(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    query_len: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    q_dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
    num_rows: int = 256,
    context_len: int = 4096,
    batch_invariant: bool = False,
    **options: Any,
) -> Variant:
    """The main kernel of one call with 8 KV heads and groups of 4.

    Args:
        dtype, q_dtype: of the cache, and of the queries.
        query_len, context_len: of each row.
        options: of the attention.
    """
    shares, tiles = (Launches(getattr(module, name), name) for name in ("share_kernel", "tile_kernel"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "share_kernel", shares)
        patch.setattr(module, "tile_kernel", tiles)
        patch.setattr(module, "num_processors", lambda device: PROCESSORS)
        for name in ("reduce_shares_kernel", "reduce_chunks_kernel"):
            patch.setattr(module, name, Launches(getattr(module, name), name))
        meta = {"device": "meta"}
        cache = torch.empty(64, 8, block_size, row_width(head_dim, dtype), dtype=dtype, **meta)
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
    (variant,) = shares.variants + tiles.variants
    return variant


PROCESSOR_OPTIONS = {"sliding_window": 128, "softcap": 30.0}
CALLS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "decode, 64 wide": (64, 1, {}),
    "decode": (128, 1, {}),
    "decode, 256 wide": (256, 1, {}),
    "decode, all masks": (128, 1, {**PROCESSOR_OPTIONS, "sinks": torch.ones(32), "alibi_slopes": torch.ones(32)}),
    "decode, fp8": (128, 1, {"dtype": torch.float8_e4m3fn}),
    "prefill, 64 wide": (64, 512, {}),
    "prefill": (128, 512, {}),
    "prefill, blocks of 128": (128, 512, {"block_size": 128}),
    "prefill, 256 wide": (256, 512, {}),
    "prefill, fp8": (128, 512, {"dtype": torch.float8_e4m3fn}),
    "prefill, batch-invariant": (128, 512, {"batch_invariant": True}),
    "prefill, all masks": (128, 512, {**PROCESSOR_OPTIONS, "sinks": torch.ones(32), "alibi_slopes": torch.ones(32)}),
    "prefill, 96 wide, blocks of 256": (96, 512, {"block_size": 256}),
    "decode, 80 wide, blocks of 256": (80, 1, {"block_size": 256}),
    "decode, int8": (128, 1, {"dtype": torch.int8}),
    "prefill, int8": (128, 512, {"dtype": torch.int8}),
    "decode, float16": (128, 1, {"dtype": torch.float16, "q_dtype": torch.float16}),
    "prefill, float16": (128, 512, {"dtype": torch.float16, "q_dtype": torch.float16}),
    "prefill, few rows, batch-invariant": (128, 256, {"num_rows": 1, "batch_invariant": True}),
    "decode, few rows, batch-invariant": (128, 1, {"num_rows": 1, "batch_invariant": True}),
    **{
        f"short chunk, {kind}": (head_dim, query_len, {"num_rows": 1, "context_len": 32768, **options})
        for kind, head_dim, query_len, options in (
            ("16 tokens", 128, 16, {}),
            ("64 tokens", 128, 64, {}),
            ("64 wide", 64, 64, {}),
            ("256 wide", 256, 64, {}),
            ("fp8", 128, 64, {"dtype": torch.float8_e4m3fn}),
            ("all masks", 128, 64, {**PROCESSOR_OPTIONS, "sinks": torch.ones(32), "alibi_slopes": torch.ones(32)}),
        )
    },
}
BY_SHARE = ("decode", "short chunk")


@pytest.fixture(scope="module")
def reports() -> dict[str, tuple[Variant, Report]]:
    with pytest.MonkeyPatch.context() as patch:
        variants = [launched(patch, head_dim, query_len, **options) for head_dim, query_len, options in CALLS.values()]
    return dict(zip(CALLS, zip(variants, compile_all(variants), strict=True), strict=True))


def test_prefills_and_short_chunks_of_long_prompts_use_wgmma(reports: dict[str, tuple[Variant, Report]]) -> None:
    for name, (variant, report) in reports.items():
        is_by_tile = not name.startswith(BY_SHARE) or "batch-invariant" in name
        assert variant.kernel.endswith("tile_kernel") == is_by_tile, name
        if not name.startswith("decode"):
            assert report.uses_wgmma, name


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


def test_nothing_spills(reports: dict[str, tuple[Variant, Report]]) -> None:
    assert {name: report.spills for name, (_, report) in reports.items() if report.spills} == {}


def test_shared_memory_fits(reports: dict[str, tuple[Variant, Report]]) -> None:
    for name, (_, report) in reports.items():
        assert report.shared_bytes <= MAX_SHARED_BYTES, name


def test_a_processor_holds_as_many_programs_by_share_as_are_launched_for_it(
    reports: dict[str, tuple[Variant, Report]],
) -> None:
    for name, (variant, report) in reports.items():
        if variant.kernel.endswith("share_kernel"):
            registers = -(-report.num_registers // 8) * 8 * 32 * variant.num_warps
            assert 2 * registers <= REGISTERS_OF_A_PROCESSOR, name
            assert 2 * (report.shared_bytes + 1024) <= MAX_SHARED_BYTES + 1024, name  # 1 KiB of each is the system's


def test_keys_and_values_are_copied_sixteen_bytes_at_a_time(reports: dict[str, tuple[Variant, Report]]) -> None:
    for name, (_, report) in reports.items():
        wide, narrow = report.ptx.count(", 0x10"), report.ptx.count(", 0x4,")
        if "fp8" not in name and "int8" not in name:  # whose rows of 132 bytes are aligned to four
            assert wide >= 16, name
            assert narrow == 0, name
