"""Paged attention on CPUs: exactness, masks, and what its bits may depend on."""

from __future__ import annotations

import pytest
import torch
from c_library import needs_c

from octavo.kernels import paged_attention
from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.attention_kind import AttentionKind
from octavo.kernels.paged_attention import paged_attention_ref, write_kv, write_kv_ref

Row = tuple[int, int]  # (new tokens, context length)


class Case:
    """A ragged batch whose rows' keys and values depend on the row's seed alone, wherever its blocks are."""

    def __init__(
        self,
        rows: list[Row],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        k_dim: int = 32,
        v_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seeds: list[int] | None = None,
        layout_seed: int = 0,
    ) -> None:
        seeds = seeds or list(range(len(rows)))
        counts = [-(-context // block_size) for _, context in rows]
        self.scale = k_dim**-0.5
        layout = torch.Generator().manual_seed(layout_seed)
        order = torch.randperm(sum(counts) + 3, generator=layout).int()
        tables = torch.zeros(len(rows), max(counts), dtype=torch.int32)
        # Slots that no row owns hold NaN: reading one shows.
        self.k_cache = torch.full((sum(counts) + 3, num_kv_heads, block_size, k_dim), torch.nan, dtype=dtype)
        self.v_cache = torch.full((sum(counts) + 3, num_kv_heads, block_size, v_dim), torch.nan, dtype=dtype)
        queries, slots, used = [], [], 0
        for row, ((num_new, context), seed) in enumerate(zip(rows, seeds, strict=True)):
            tables[row, : counts[row]] = order[used : used + counts[row]]
            used += counts[row]
            generator = torch.Generator().manual_seed(1000 + seed)
            k = torch.randn(context, num_kv_heads, k_dim, generator=generator).to(dtype)
            v = torch.randn(context, num_kv_heads, v_dim, generator=generator).to(dtype)
            positions = torch.arange(context)
            row_slots = tables[row, positions // block_size].long() * block_size + positions % block_size
            write_kv_ref(k, v, self.k_cache, self.v_cache, row_slots)
            all_queries = 2 * torch.randn(context, num_heads, k_dim, generator=generator).to(dtype)
            queries.append(all_queries[context - num_new :])
            slots.append(row_slots[context - num_new :])
        self.q = torch.cat(queries)
        num_new_tokens = torch.tensor([0, *(num_new for num_new, _ in rows)])
        self.batch = AttentionBatch(
            query_start=num_new_tokens.cumsum(0).int(),
            context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
            block_tables=tables,
            slot_mapping=torch.cat(slots),
            block_size=block_size,
            max_query_len=max(num_new for num_new, _ in rows),
            max_context_len=max(context for _, context in rows),
            num_decodes=sum(1 for num_new, _ in rows if num_new == 1),
        )

    def attend(self, **options: object) -> torch.Tensor:
        kind = AttentionKind(self.scale, **options)
        return paged_attention.paged_attention(self.q, self.k_cache, self.v_cache, self.batch, kind)

    def reference(self, dtype: torch.dtype | None = None, **options: object) -> torch.Tensor:
        """In `dtype`; None: the torch path, in the cache's own."""
        q, k, v = (x if dtype is None else x.to(dtype) for x in (self.q, self.k_cache, self.v_cache))
        return paged_attention_ref(q, k, v, self.batch, AttentionKind(self.scale, **options))


RAGGED = [(1, 1), (1, 130), (1, 64), (5, 5), (40, 100), (70, 70), (3, 65)]
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "wide_window": {"sliding_window": 66},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "all": {
        "sliding_window": 33,
        "softcap": 5.0,
        "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
    },
}


def assert_as_exact_as_torch(case: Case, **options: object) -> None:
    exact = case.reference(torch.float64, **options)
    ours, theirs = case.attend(**options), case.reference(**options)
    assert ours.dtype == case.q.dtype
    error, allowed = (ours - exact).abs().max(), 2 * (theirs - exact).abs().max()
    assert error <= allowed, f"{error=} {allowed=}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_mask_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(Case(RAGGED, dtype=dtype), **OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "k_dim", "v_dim"),
    [(2, 2, 24, 24), (8, 1, 40, 40), (6, 2, 80, 80), (3, 1, 20, 12), (5, 5, 7, 9), (16, 8, 128, 128), (40, 1, 72, 64)],
)
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_every_shape_is_as_exact_as_torch(
    num_heads: int, num_kv_heads: int, k_dim: int, v_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "k_dim": k_dim, "v_dim": v_dim}
    assert_as_exact_as_torch(Case([(1, 67), (1, 3), (33, 90)], dtype=dtype, block_size=block_size, **shape))


def test_the_meaning_is_causal_softmax_attention() -> None:
    case = Case([(9, 9)], num_heads=2, num_kv_heads=2, block_size=4)
    k = torch.stack([case.k_cache[s // 4, :, s % 4] for s in case.batch.slot_mapping.tolist()])
    v = torch.stack([case.v_cache[s // 4, :, s % 4] for s in case.batch.slot_mapping.tolist()])
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    torch.testing.assert_close(case.reference(), sdpa)
    torch.testing.assert_close(case.attend(), sdpa)


def test_queries_may_be_a_view_of_a_fused_projection_in_another_dtype_than_the_cache() -> None:
    case = Case(RAGGED, dtype=torch.bfloat16)
    contiguous = case.q.float()
    kind = AttentionKind(case.scale)
    expected = paged_attention.paged_attention(contiguous, case.k_cache, case.v_cache, case.batch, kind)
    fused = torch.randn(contiguous.shape[0], 8, 40)
    fused[:, 2:6, :32] = contiguous
    case.q = fused[:, 2:6, :32]
    assert torch.equal(case.attend(), expected)


def test_tokens_of_no_row_are_zero() -> None:
    case = Case([(1, 5), (4, 9)])
    case.q = torch.cat((case.q, torch.ones(3, *case.q.shape[1:])))
    out = case.attend()
    assert torch.equal(out[5:], torch.zeros_like(out[5:]))
    assert torch.equal(case.reference()[5:], out[5:])


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "window", "all"])
def test_a_row_alone_equals_that_row_in_a_batch_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    together = Case(RAGGED, dtype=dtype).attend(**OPTIONS[name])
    start = 0
    for seed, (num_new, context) in enumerate(RAGGED):
        alone = Case([(num_new, context)], dtype=dtype, seeds=[seed], layout_seed=seed).attend(**OPTIONS[name])
        assert torch.equal(alone, together[start : start + num_new]), (num_new, context)
        start += num_new


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("dim", [32, 20])
@pytest.mark.parametrize("name", ["plain", "wide_window"])
def test_decoding_and_prefilling_in_any_chunks_and_block_sizes_give_the_same_bits(
    name: str, dim: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    options = OPTIONS[name]
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "k_dim": dim, "v_dim": dim, "dtype": dtype}
    context = 135
    whole = Case([(context, context)], seeds=[5], **shape).attend(**options)
    for end, chunk, block_size in [(135, 1, 16), (135, 35, 1), (100, 36, 7), (64, 64, 256), (65, 1, 64), (66, 2, 32)]:
        # The last `chunk` of the first `end` tokens: the longer row, cut off behind `end`.
        case = Case([(context, context)], seeds=[5], block_size=block_size, layout_seed=end, **shape)
        case.q = case.q[end - chunk : end]
        case.batch = AttentionBatch(
            query_start=torch.tensor([0, chunk], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=case.batch.block_tables,
            slot_mapping=case.batch.slot_mapping[end - chunk : end],
            block_size=block_size,
            max_query_len=chunk,
            max_context_len=end,
            num_decodes=int(chunk == 1),
        )
        assert torch.equal(case.attend(**options), whole[end - chunk : end]), (end, chunk, block_size)


@needs_c
def test_the_number_of_threads_changes_no_bit() -> None:
    case = Case([(1, 300), (200, 300)], num_heads=8, num_kv_heads=4, k_dim=64, v_dim=64)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(case.attend())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_without_the_c_library_the_torch_path_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(RAGGED)
    monkeypatch.setattr(paged_attention, "_kernels", lambda: None)
    assert torch.equal(case.attend(softcap=3.0), case.reference(softcap=3.0))


@pytest.mark.parametrize("with_c", [pytest.param(True, marks=needs_c), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv_fills_the_slots_skips_padding_and_touches_nothing_else(
    with_c: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_c:
        monkeypatch.setattr(paged_attention, "_kernels", lambda: None)
    fused = torch.randn(5, 2, 3, 8).to(dtype)
    k, v = fused[:, 0], fused[:, 1, :, :6]  # strided views
    k_cache, v_cache = torch.zeros(4, 3, 2, 8, dtype=dtype), torch.zeros(4, 3, 2, 6, dtype=dtype)
    slots = torch.tensor([7, -1, 0, 3, -1])
    write_kv(k, v, k_cache, v_cache, slots)
    for slot in range(8):
        token = slots.tolist().index(slot) if slot in slots.tolist() else None
        expected_k = torch.zeros(3, 8, dtype=dtype) if token is None else k[token]
        expected_v = torch.zeros(3, 6, dtype=dtype) if token is None else v[token]
        assert torch.equal(k_cache[slot // 2, :, slot % 2], expected_k)
        assert torch.equal(v_cache[slot // 2, :, slot % 2], expected_v)


def test_write_kv_refuses_a_slot_outside_the_cache() -> None:
    with pytest.raises(IndexError):
        write_kv(
            torch.ones(1, 1, 8),
            torch.ones(1, 1, 8),
            torch.zeros(2, 1, 4, 8),
            torch.zeros(2, 1, 4, 8),
            torch.tensor([8]),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_context_gives_zeros(dtype: torch.dtype) -> None:
    """By the C kernel and by torch: padding, beside a row that is none."""
    cache = torch.randn(2, 2, 4, 8, dtype=dtype)
    batch = AttentionBatch(
        query_start=torch.tensor([0, 1, 2], dtype=torch.int32),
        context_lens=torch.tensor([3, 0], dtype=torch.int32),
        block_tables=torch.zeros(2, 2, dtype=torch.int32),
        slot_mapping=torch.tensor([2, -1]),
        block_size=4,
        max_query_len=1,
        max_context_len=3,
        num_decodes=2,
    )
    out = paged_attention.paged_attention(torch.randn(2, 4, 8, dtype=dtype), cache, cache, batch, AttentionKind(0.5))
    assert out[0].abs().min() > 0
    assert out[1].eq(0.0).all()
