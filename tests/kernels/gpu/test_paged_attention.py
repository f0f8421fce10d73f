"""Paged attention's Triton kernels in the interpreter: equal to their meaning, and what their bits may depend on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_case import Case, Row, make_case

from octavo.kernels.attention_kind import AttentionKind
from octavo.kernels.gpu import attention_config, launch
from octavo.kernels.gpu import paged_attention as paged_attention_module
from octavo.kernels.gpu.attention_config import Problem, choose_schedule
from octavo.kernels.gpu.paged_attention import paged_attention, write_kv
from octavo.kernels.kv_quantization import dequantize
from octavo.kernels.paged_attention import write_kv_ref

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "wide_window": {"sliding_window": 34},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS},
    "alibi": {"alibi_slopes": SLOPES},
    "all": {"sliding_window": 33, "softcap": 5.0, "sinks": SINKS, "alibi_slopes": SLOPES},
}
# Two decodes (of one token, and over a boundary of tiles), a whole prompt, a chunk that ends a block.
MIXED: list[Row] = [(1, 1), (1, 40), (18, 18), (7, 48)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the interpreter takes tens of milliseconds; four are enough to be cut between."""
    monkeypatch.setattr(paged_attention_module, "num_processors", lambda _device: 2)
    monkeypatch.setattr(paged_attention_module, "FEWEST_ROWS", 1)  # no lane without a row, so that none is relied on


def attend(
    case: Case, *, batch_invariant: bool = False, schedule: attention_config.Schedule | None = None, **options: object
) -> torch.Tensor:
    # An output that nothing was written to shows.
    out = torch.full((*case.q.shape[:2], case.reference().shape[2]), torch.nan, dtype=case.q.dtype)
    result = paged_attention(
        *(case.q, case.k_cache, case.v_cache, case.batch, AttentionKind(case.scale, **options)),
        out=out,
        batch_invariant=batch_invariant,
        schedule=schedule,
    )
    assert result is out
    return out


def assert_equals_its_meaning(case: Case, **options: object) -> None:
    invariant = options.pop("batch_invariant", False)
    expected = case.reference(**options)
    ours = attend(case, batch_invariant=invariant, **options)
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_mask_of_prefills_equals_its_meaning(name: str) -> None:
    case = make_case([(33, 48), (34, 34)], padded_rows=1, padded_tokens=5)
    assert_equals_its_meaning(case, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_mask_of_a_mixed_batch_equals_its_meaning_where_bits_are_promised(name: str) -> None:
    case = make_case(MIXED, padded_rows=2, padded_tokens=5)
    assert_equals_its_meaning(case, batch_invariant=True, **OPTIONS[name])


@pytest.mark.parametrize("name", ["window", "all"])
def test_masks_of_decodes_equal_their_meaning(name: str) -> None:
    case = make_case([(1, 1), (1, 40), (1, 90), (1, 8)], padded_rows=2, padded_tokens=5)
    assert_equals_its_meaning(case, **OPTIONS[name])


def test_a_mixed_batch_equals_its_meaning() -> None:
    assert_equals_its_meaning(make_case(MIXED, padded_rows=2, padded_tokens=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "k_dim", "v_dim", "block_size"),
    [
        (2, 1, 64, 64, 256),
        (4, 1, 80, 80, 16),
        (3, 1, 96, 96, 1),  # a group that is no power of two, and a block a token
        (3, 1, 128, 64, 32),
        (2, 2, 7, 9, 3),  # nothing here is a power of two
        (2, 1, 256, 256, 128),
        (17, 1, 20, 12, 64),  # more heads of a group than rows of a float32 tile
    ],
)
def test_every_shape_equals_its_meaning(
    num_heads: int, num_kv_heads: int, k_dim: int, v_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "k_dim": k_dim, "v_dim": v_dim}
    assert_equals_its_meaning(make_case([(1, 33), (1, 3), (2, 37)], dtype=dtype, block_size=block_size, **shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_contexts_at_boundaries_of_blocks_and_tiles_equal_their_meaning(dtype: torch.dtype) -> None:
    rows = [(1, context) for context in (1, 15, 16, 17, 31, 32, 33, 64, 65)]
    assert_equals_its_meaning(make_case(rows, num_heads=2, num_kv_heads=1, dtype=dtype))


def test_a_batch_of_drafts_to_verify_equals_its_meaning() -> None:
    assert_equals_its_meaning(make_case([(4, 40), (1, 9), (3, 3)], num_heads=3, num_kv_heads=1))


def test_a_short_chunk_of_a_long_prompt_is_cut_into_shares() -> None:
    """Its query tiles are few, its keys many: by share, though it is no decode."""
    rows: list[Row] = [(17, 130)]
    problem = dataclasses.replace(DECODES, num_rows=1, num_tokens=17, max_query_len=17, max_context_len=130)
    schedule = choose_schedule(problem, batch_invariant=False)
    assert schedule.by_share
    assert schedule.block_m == 64  # so that there are two query tiles
    case = make_case(rows, num_heads=4, num_kv_heads=1, dtype=torch.float16)
    assert_equals_its_meaning(case, sliding_window=100)


def test_rows_without_keys_and_tokens_of_no_row_are_zeros() -> None:
    case = make_case([(1, 20), (1, 5), (1, 9)], padded_tokens=3)
    lens = case.batch.context_lens.clone()
    lens[1] = 0  # its query is there, its keys are not
    case.batch = dataclasses.replace(case.batch, context_lens=lens)
    case.q[3:] = torch.nan
    for batch_invariant in (False, True):
        out = attend(case, batch_invariant=batch_invariant, sinks=SINKS)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert torch.equal(out[3:], torch.zeros_like(out[3:]))
        assert bool((out[[0, 2]] != 0).all())
    nothing = dataclasses.replace(case.batch, context_lens=torch.zeros_like(lens), query_start=torch.zeros(4).int())
    case.batch = nothing
    assert not attend(case).any()


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_quantised_cache_equals_its_meaning(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    case = make_case(
        [(1, 33), (12, 37)], num_heads=2, num_kv_heads=1, k_dim=20, v_dim=16, dtype=dtype, cache_dtype=cache_dtype
    )
    expected = case.reference(sliding_window=50, softcap=3.0)
    ours = attend(case, sliding_window=50, softcap=3.0)
    torch.testing.assert_close(ours, expected, atol=4e-3, rtol=4e-3)  # queries and weights pass through float16


def test_values_of_a_quantised_cache_may_be_tiny_or_huge() -> None:
    case = make_case([(1, 33)], num_heads=2, num_kv_heads=1, cache_dtype=torch.int8)
    plain = dequantize(case.v_cache)
    for factor in (1e-5, 1e4):
        block_ids = case.batch.block_tables[0].long()
        slots = (block_ids[:, None] * 16 + torch.arange(16)).flatten()[:33]
        v = plain[block_ids].transpose(1, 2).reshape(-1, 1, 16)[:33] * factor
        write_kv_ref(v, v, case.v_cache.clone(), case.v_cache, slots)
        expected = case.reference()
        error = (attend(case) - expected).norm() / expected.norm()
        assert error < 2e-3


def test_bounds_of_a_captured_graph_change_no_bit() -> None:
    case = make_case([(1, 20), (1, 70)], num_heads=2)
    tight = attend(case)
    case.batch = dataclasses.replace(case.batch, max_context_len=40960)
    assert torch.equal(attend(case), tight)
    prefill = make_case([(33, 48), (34, 34)])
    tight = attend(prefill)
    prefill.batch = dataclasses.replace(prefill.batch, max_context_len=40960, max_query_len=64)
    assert torch.equal(attend(prefill), tight)


INVARIANCE = {"num_heads": 2, "num_kv_heads": 1}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_config, "CHUNK_TOKENS", 64)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("k_dim", "options"),
    [(16, {}), (16, {"sliding_window": 90, "softcap": 4.0, "sinks": SINKS[:2]}), (256, {})],
    ids=["plain", "all", "wide"],
)
def test_a_querys_bits_are_its_own_where_that_is_promised(
    k_dim: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefilled at once, in chunks, decoded alone, or among others in other blocks: the same."""
    shape = {**INVARIANCE, "k_dim": k_dim}
    whole = make_case([(150, 150)], seeds=[7], dtype=torch.float16, **shape)
    monkeypatch.setattr(attention_config, "MAX_CHUNK_BYTES", 150 * 2 * 2 * (k_dim + 2) * 4)  # too few for this one
    expected = attend(whole, batch_invariant=True, **options)
    torch.testing.assert_close(expected, whole.reference(**options), atol=4e-3, rtol=4e-3)
    for rows, block_size in (([(1, 150)], 16), ([(9, 150)], 64), ([(1, 3), (1, 150), (5, 40)], 5)):
        seeds = [7 if context == 150 else 1 for _, context in rows]
        case = make_case(
            rows, seeds=seeds, layout_seed=3, block_size=block_size, dtype=torch.float16, padded_tokens=2, **shape
        )
        at = seeds.index(7)
        start = int(case.batch.query_start[at])
        ours = attend(case, batch_invariant=True, **options)[start : start + rows[at][0]]
        assert torch.equal(ours, expected[150 - rows[at][0] :]), (rows, block_size)


@pytest.mark.usefixtures("small_chunks")
def test_splitting_chunks_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(1, 20), (1, 150), (9, 100)], dtype=torch.float16, k_dim=16, **INVARIANCE)
    split = attend(case, batch_invariant=True)
    monkeypatch.setattr(attention_config, "MAX_CHUNK_BYTES", 0)
    assert torch.equal(attend(case, batch_invariant=True), split)


DECODES = Problem(
    num_rows=8,
    num_tokens=8,
    max_query_len=1,
    max_context_len=4096,
    group=4,
    num_kv_heads=8,
    head_dim=128,
    element_bytes=2,
    cache_bytes=2,
    block_size=16,
    num_processors=132,
)


def test_schedules_fit_their_batches() -> None:
    prefill = dataclasses.replace(DECODES, num_rows=1, num_tokens=8192, max_query_len=8192, max_context_len=8192)
    assert choose_schedule(DECODES, batch_invariant=False).by_share
    assert choose_schedule(DECODES, batch_invariant=False).block_m == 16
    assert not choose_schedule(prefill, batch_invariant=False).by_share
    assert choose_schedule(prefill, batch_invariant=False).block_m == 128
    # Invariance: one tiling whatever the batch, chunks split only where programs are few.
    few, many = (choose_schedule(problem, batch_invariant=True) for problem in (DECODES, prefill))
    assert few.split
    assert not many.split
    assert dataclasses.replace(few, split=False) == many


def test_what_the_kernels_cannot_take_is_said() -> None:
    case, kind = make_case([(1, 5)]), AttentionKind(1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        paged_attention(case.q, case.k_cache, case.v_cache, case.batch, AttentionKind(0.0))
    with pytest.raises(ValueError, match="cast one of them"):
        paged_attention(case.q.half(), case.k_cache, case.v_cache, case.batch, kind)
    with pytest.raises(ValueError, match="must be contiguous"):
        paged_attention(case.q, case.k_cache.transpose(0, 1), case.v_cache.transpose(0, 1), case.batch, kind)
    wide = make_case([(1, 5)], v_dim=264)
    with pytest.raises(ValueError, match="at most 256"):
        paged_attention(wide.q, wide.k_cache, wide.v_cache, wide.batch, kind)
    odd = make_case([(1, 5)], k_dim=6, cache_dtype=torch.int8)
    with pytest.raises(ValueError, match="multiple of 4"):
        paged_attention(odd.q, odd.k_cache, odd.v_cache, odd.batch, kind)


def test_queries_may_be_a_view_of_a_fused_projection() -> None:
    case = make_case([(1, 20), (3, 9)])
    expected = attend(case)
    fused = torch.full((4, 8, 24), torch.nan)
    fused[:, 2:6, :16] = case.q
    case.q = fused[:, 2:6, :16]
    assert torch.equal(attend(case), expected)


def test_blocks_beyond_two_billion_elements_are_reached() -> None:
    """Addresses are 64 bits wide. The cache is reserved, not touched, but for the blocks of one row."""
    num_blocks = 2**31 // (2 * 16 * 20) + 8
    cache = torch.empty(num_blocks, 2, 16, 20, dtype=torch.int8)
    case = make_case([(1, 20)], cache_dtype=torch.int8)
    case.batch = dataclasses.replace(
        case.batch, block_tables=torch.tensor([[num_blocks - 1, num_blocks - 3]], dtype=torch.int32)
    )
    positions = torch.arange(20)
    slots = case.batch.block_tables[0, positions // 16].long() * 16 + positions % 16
    k = torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(0))
    write_kv(k, k, cache, cache, slots)
    case.k_cache = case.v_cache = cache
    torch.testing.assert_close(attend(case), case.reference(), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_write_kv_equals_its_meaning_and_skips_padding(cache_dtype: torch.dtype) -> None:
    k = torch.randn(7, 3, 2 * 12, generator=torch.Generator().manual_seed(0))[..., ::2].contiguous()
    v = torch.randn(7, 5, 20, generator=torch.Generator().manual_seed(1))[:, 1:4]
    k[2, 1] = 0.0
    v[3, 2, 5] = torch.inf
    slots = torch.tensor([3, -1, 17, 4, 40, -1, 0])
    extra = 4 * (cache_dtype.itemsize == 1)
    k_cache, v_cache = (torch.zeros(6, 3, 8, dim + extra).to(cache_dtype) for dim in (12, 20))
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    write_kv_ref(k, v, k_expected, v_expected, slots)
    write_kv(k, v, k_cache, v_cache, slots)
    for ours, expected in ((k_cache, k_expected), (v_cache, v_expected)):
        if cache_dtype is torch.float8_e4m3fn:
            # Scales are the same; the interpreter's cast to fp8 drops a carry now and then, as no GPU does.
            assert torch.equal(ours.view(torch.uint8)[..., -4:], expected.view(torch.uint8)[..., -4:])
            close = torch.isclose(dequantize(ours), dequantize(expected), equal_nan=True, atol=1e-2, rtol=0.13)
            assert close.float().mean() > 0.99
        else:
            assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


def test_nothing_is_compiled_in_the_interpreter() -> None:
    assert launch.is_interpreted()
    assert launch.UPCAST
    assert launch.compilations() == 0
    assert launch.num_processors(torch.device("cpu")) > 0


@pytest.mark.parametrize("invariant", [False, True])
def test_rows_of_one_token_and_no_context_give_zeros_wherever_they_stand(invariant: bool) -> None:
    """As a graph of decodes and chunks is padded: behind the decodes, and behind the chunks, whose bounds are loose."""
    rows = [(1, 30), (1, 2), (1, 16), (1, 16), (9, 40), (5, 5)]
    case = make_case(rows, padded_rows=2, padded_tokens=6)
    context_lens = case.batch.context_lens.clone()
    context_lens[2:4] = 0
    padded = dataclasses.replace(
        case.batch, context_lens=context_lens, max_query_len=20, max_context_len=100, num_decodes=4
    )
    expected = case.reference()
    expected[2:4] = 0.0
    ours = attend(dataclasses.replace(case, batch=padded), batch_invariant=invariant)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    assert ours[2:4].eq(0.0).all()
    assert ours[-6:].eq(0.0).all()


def test_layers_of_a_kind_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Problem] = []

    def choose(problem: Problem, *, batch_invariant: bool) -> attention_config.Schedule:
        planned.append(problem)
        return choose_schedule(problem, batch_invariant=batch_invariant)

    monkeypatch.setattr(paged_attention_module, "choose_schedule", choose)
    case = make_case(MIXED)
    first = attend(case)
    assert len(planned) == 2  # decodes, and the others
    assert torch.equal(attend(case), first)
    assert len(planned) == 2
    windowed = attend(case, sliding_window=7)
    assert len(planned) == 4
    assert torch.equal(attend(case, sliding_window=7), windowed)
    assert torch.equal(attend(case), first)
    assert len(planned) == 4
    assert not torch.equal(first, windowed)
    attend(make_case(MIXED))  # another batch
    assert len(planned) == 6


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("by_share", [False, True])
def test_a_step_without_rows_gives_zeros_where_a_graph_is_captured_for_some(invariant: bool, by_share: bool) -> None:
    """Which is what is loaded then: cuts are where the graph has them, and no row has a token."""
    case = make_case([(1, 9), (1, 2), (1, 5), (7, 20), (3, 3)], padded_rows=2)
    nothing = dataclasses.replace(
        case.batch,
        query_start=torch.zeros_like(case.batch.query_start),
        context_lens=torch.zeros_like(case.batch.context_lens),
        max_query_len=4 if by_share else 60,
        max_context_len=200,
        num_decodes=3,
    )
    ours = attend(dataclasses.replace(case, batch=nothing), batch_invariant=invariant)
    assert ours.eq(0.0).all()
