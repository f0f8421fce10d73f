"""Quantised KV rows: what is written, how far off it is, and attention over it."""

from __future__ import annotations

import pytest
import torch
from c_library import needs_c

from octavo.kernels import paged_attention, rotary
from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.attention_kind import AttentionKind
from octavo.kernels.kv_quantization import SCALE_BYTES, dequantize, head_dim_of, quantize_ref, row_width
from octavo.kernels.paged_attention import gather_kv, paged_attention_ref, write_kv, write_kv_ref

KINDS = [torch.int8, torch.float8_e4m3fn]
RAGGED = [(1, 1), (1, 130), (1, 64), (5, 5), (40, 100), (3, 65)]
# Largest error of an attention output in units of the largest value, for random normal keys, values and queries.
OUTPUT_BOUND = {torch.int8: 0.015, torch.float8_e4m3fn: 0.08}


def empty_cache(num_blocks: int, num_heads: int, block_size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes whose codes and scales are NaN (or -1, in int8): reading a slot that nobody wrote shows."""
    shape = (num_blocks, num_heads, block_size, row_width(dim, dtype))
    return torch.full(shape, 0xFF, dtype=torch.uint8).view(dtype)


def rows_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` `[n, dim]` as the C kernel writes it."""
    cache = empty_cache(x.shape[0], 1, 1, x.shape[1], dtype)
    write_kv(x[:, None], x[:, None], cache, cache.clone(), torch.arange(x.shape[0]))
    return cache[:, 0, 0]


def awkward_rows(dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary rows, ties, outliers, zeros, tiny and huge numbers."""
    generator = torch.Generator().manual_seed(3)
    ordinary = torch.randn(40, dim, generator=generator) * torch.logspace(-8, 8, 40)[:, None]
    ties = torch.arange(dim).float()[None] * 0.5 - dim / 4
    ties[0, 0] = 127.0
    outlier = torch.randn(1, dim, generator=generator)
    outlier[0, dim // 2] = 1e4
    zeros, tiny = torch.zeros(1, dim), torch.full((1, dim), 1e-42)
    huge = torch.full((1, dim), 3e38 if dtype is not torch.float16 else 6e4)
    huge[0, 0] *= -1
    return torch.cat((ordinary, ties, outlier, zeros, tiny, huge)).clamp(-6e4, 6e4).to(dtype)


@needs_c
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [7, 64, 72, 128])
def test_the_kernel_writes_the_bytes_that_the_meaning_says(dim: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    x = awkward_rows(dim, dtype)
    assert torch.equal(rows_of(x, kind).view(torch.uint8), quantize_ref(x, kind).view(torch.uint8))


@pytest.mark.parametrize("dim", [8, 128])
def test_an_int8_number_is_off_by_half_a_scale_at_most(dim: int) -> None:
    x = awkward_rows(dim, torch.float32).double()
    error = (dequantize(quantize_ref(x.float(), torch.int8)).double() - x).abs()
    assert (error <= 0.5001 / 127 * x.abs().amax(-1, keepdim=True) + 2.0**-100).all()


@pytest.mark.parametrize("dim", [8, 128])
def test_an_fp8_number_is_off_by_a_sixteenth_or_half_of_the_smallest_step(dim: int) -> None:
    x = awkward_rows(dim, torch.float32).double()
    error = (dequantize(quantize_ref(x.float(), torch.float8_e4m3fn)).double() - x).abs()
    step = x.abs().amax(-1, keepdim=True) / 448 * 2.0**-10
    assert (error <= torch.maximum(x.abs() / 16, step) * 1.0001 + 2.0**-100).all()


@pytest.mark.parametrize("with_c", [pytest.param(True, marks=needs_c), False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_a_number_that_is_not_finite_reads_as_nan(
    bad: float, kind: torch.dtype, with_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_c:
        monkeypatch.setattr(paged_attention, "_kernels", lambda: None)
    x = torch.ones(2, 16)
    x[0, 9] = bad
    rows = dequantize(rows_of(x, kind))
    assert rows[0].isnan().all()
    assert torch.equal(rows[1], x[1])


def case(
    kind: torch.dtype, *, heads: tuple[int, int] = (4, 2), dim: int = 32, block_size: int = 16, rows: object = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Queries, quantised caches, their batch, and each row's keys and values before they were quantised."""
    ragged: list[tuple[int, int]] = RAGGED if rows is None else rows  # type: ignore[assignment]
    counts = [-(-context // block_size) for _, context in ragged]
    tables = torch.zeros(len(ragged), max(counts), dtype=torch.int32)
    k_cache = empty_cache(sum(counts) + 2, heads[1], block_size, dim, kind)
    v_cache = k_cache.clone()
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(0)).int()
    queries, slots, plain, used = [], [], [], 0
    for row, (num_new, context) in enumerate(ragged):
        tables[row, : counts[row]] = order[used : used + counts[row]]
        used += counts[row]
        generator = torch.Generator().manual_seed(context)
        k, v = (torch.randn(context, heads[1], dim, generator=generator) for _ in range(2))
        positions = torch.arange(context)
        row_slots = tables[row, positions // block_size].long() * block_size + positions % block_size
        write_kv_ref(k, v, k_cache, v_cache, row_slots)
        plain.append((k, v))
        queries.append(torch.randn(context, heads[0], dim, generator=generator)[context - num_new :])
        slots.append(row_slots[context - num_new :])
    batch = AttentionBatch(
        query_start=torch.tensor([0, *(num_new for num_new, _ in ragged)]).cumsum(0).int(),
        context_lens=torch.tensor([context for _, context in ragged], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        block_size=block_size,
        max_query_len=max(num_new for num_new, _ in ragged),
        max_context_len=max(context for _, context in ragged),
        num_decodes=3,
    )
    return torch.cat(queries), k_cache, v_cache, batch, plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim", "block_size"), [((4, 2), 32, 16), ((8, 1), 72, 1), ((5, 5), 7, 256)])
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 33}, {"softcap": 5.0}, {"sliding_window": 7, "softcap": 2.0}],
    ids=["plain", "window", "softcap", "both"],
)
def test_the_kernel_is_as_exact_over_codes_as_torch(
    options: dict[str, float], heads: tuple[int, int], dim: int, block_size: int, dtype: torch.dtype, kind: torch.dtype
) -> None:
    q, k_cache, v_cache, batch, _ = case(kind, heads=heads, dim=dim, block_size=block_size)
    q, kind_of_layer = q.to(dtype), AttentionKind(dim**-0.5, **options)
    exact = paged_attention_ref(q.double(), k_cache, v_cache, batch, kind_of_layer)
    theirs = paged_attention_ref(q, k_cache, v_cache, batch, kind_of_layer)
    ours = paged_attention.paged_attention(q, k_cache, v_cache, batch, kind_of_layer)
    assert ours.dtype is dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [32, 128])
def test_attention_over_a_quantised_cache_stays_within_its_bound_of_float64(dim: int, kind: torch.dtype) -> None:
    q, k_cache, v_cache, batch, plain = case(kind, dim=dim)
    ours = paged_attention.paged_attention(q, k_cache, v_cache, batch, AttentionKind(dim**-0.5))
    exact_k = torch.zeros(*k_cache.shape[:3], dim, dtype=torch.float64)
    exact_v = exact_k.clone()
    for row, (k, v) in enumerate(plain):
        positions = torch.arange(k.shape[0])
        row_slots = batch.block_tables[row, positions // 16].long() * 16 + positions % 16
        write_kv_ref(k.double(), v.double(), exact_k, exact_v, row_slots)
    exact = paged_attention_ref(q.double(), exact_k, exact_v, batch, AttentionKind(dim**-0.5))
    worst = float((ours - exact).abs().max() / exact_v.abs().max())
    assert 0 < worst <= OUTPUT_BOUND[kind]


@needs_c
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 32), ((6, 1), 20)])
def test_bits_depend_neither_on_the_batch_nor_on_the_chunk(heads: tuple[int, int], dim: int, kind: torch.dtype) -> None:
    q, k_cache, v_cache, batch, _ = case(kind, heads=heads, dim=dim)
    together = paged_attention.paged_attention(q, k_cache, v_cache, batch, AttentionKind(dim**-0.5))
    for row, (num_new, context) in enumerate(RAGGED):
        for num_last in {1, num_new}:
            end = int(batch.query_start[row + 1])
            alone = AttentionBatch(
                query_start=torch.tensor([0, num_last], dtype=torch.int32),
                context_lens=torch.tensor([context], dtype=torch.int32),
                block_tables=batch.block_tables[row : row + 1],
                slot_mapping=batch.slot_mapping[end - num_last : end],
                block_size=16,
                max_query_len=num_last,
                max_context_len=context,
                num_decodes=int(num_last == 1),
            )
            out = paged_attention.paged_attention(
                q[end - num_last : end], k_cache, v_cache, alone, AttentionKind(dim**-0.5)
            )
            assert torch.equal(out, together[end - num_last : end])


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_c_library_the_torch_path_reads_and_writes_the_same_cache(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k_cache, v_cache, batch, plain = case(kind)
    with_kernel = paged_attention.paged_attention(q, k_cache, v_cache, batch, AttentionKind(0.2))
    monkeypatch.setattr(paged_attention, "_kernels", lambda: None)
    monkeypatch.setattr(rotary, "_kernels", lambda: None)
    torch.testing.assert_close(
        paged_attention.paged_attention(q, k_cache, v_cache, batch, AttentionKind(0.2)),
        with_kernel,
        rtol=1e-4,
        atol=1e-5,
    )
    k = plain[4][0]
    gathered = gather_kv(k_cache, batch.block_tables[4], k.shape[0]).transpose(0, 1)
    assert torch.equal(gathered, dequantize(quantize_ref(k, kind)))


@pytest.mark.parametrize("kind", [*KINDS, torch.bfloat16])
def test_rotary_writes_the_same_rows_as_write_kv(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(5, heads, 32, generator=generator) for heads in (4, 2, 2))
    angles = torch.rand(64, 16, generator=generator)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    slots = torch.tensor([3, -1, 0, 17, 9])
    caches = (
        [torch.zeros(2, 2, 16, row_width(32, kind), dtype=torch.uint8).view(kind) for _ in range(4)]
        if (kind in KINDS)
        else [torch.zeros(2, 2, 16, 32, dtype=kind) for _ in range(4)]
    )
    rotary.rotary_and_write(q, k, v, cos_sin, torch.arange(5), caches[0], caches[1], slots)
    write_kv(k, v, caches[2], caches[3], slots)
    for ours, theirs in ((caches[0], caches[2]), (caches[1], caches[3])):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert ours.view(torch.uint8).any()


def test_a_row_is_its_codes_and_four_bytes() -> None:
    assert row_width(128, torch.int8) == 128 + SCALE_BYTES
    assert row_width(128, torch.bfloat16) == 128
    assert head_dim_of(torch.zeros(1, 1, 1, 132, dtype=torch.int8)) == 128
    assert head_dim_of(torch.zeros(1, 1, 1, 132)) == 132
