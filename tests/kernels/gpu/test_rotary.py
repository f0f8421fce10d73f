"""The fused rotary kernel against its meaning, over head shapes, norms, caches and padding."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.kernels.gpu import rotary as gpu
from octavo.kernels.kv_quantization import quantize_ref, row_width
from octavo.kernels.rotary import rotary_and_write_ref

DTYPES = [torch.float32, torch.float16]
SHAPES = [  # head_dim, rotary_dim, v_head_dim, num_heads, num_kv_heads
    (64, 64, 64, 4, 2),
    (24, 24, 24, 3, 1),
    (80, 32, 80, 4, 4),
    (10, 6, 12, 5, 1),
    (128, 128, 128, 18, 9),  # more heads than one program takes
]


def cos_sin_table(max_position: int, rotary_dim: int) -> torch.Tensor:
    angles = torch.arange(max_position)[:, None] * 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype, num_tokens: int = 6) -> Inputs:
    """q, k and v as views of one fused projection."""
    head_dim, _, v_head_dim, num_heads, num_kv_heads = shape
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * v_head_dim]
    fused = torch.randn(num_tokens, sum(sizes), generator=torch.Generator().manual_seed(4)).to(dtype)
    q, k, v = fused.split(sizes, dim=-1)
    return (
        q.view(num_tokens, num_heads, head_dim),
        k.view(num_tokens, num_kv_heads, head_dim),
        v.view(num_tokens, num_kv_heads, v_head_dim),
    )


def weights_of(head_dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: (1 + 0.1 * torch.randn(head_dim, generator=torch.Generator().manual_seed(i))).to(dtype)
        for i, name in enumerate(("q_weight", "k_weight"))
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "norm"),
    [*((shape, "both") for shape in SHAPES), *((shape, "none") for shape in SHAPES[2:4]), (SHAPES[0], "k")],
)
def test_it_is_as_exact_as_torch_and_writes_what_it_computed(
    shape: tuple[int, int, int, int, int], norm: str, dtype: torch.dtype
) -> None:
    head_dim, rotary_dim, v_head_dim, _, num_kv_heads = shape
    table, positions = cos_sin_table(50, rotary_dim), torch.tensor([0, 3, 49, 7, 7, 20])
    weights = {} if norm == "none" else weights_of(head_dim, dtype)
    if norm == "k":
        del weights["q_weight"]
    slots = torch.tensor([4, -1, 11, 0, 5, 6])
    results = []
    for op, run_dtype in (
        (gpu.rotary_and_write, dtype),
        (rotary_and_write_ref, dtype),
        (rotary_and_write_ref, torch.float64),
    ):
        q, k, v = (x.to(run_dtype) for x in inputs(shape, dtype))
        k_cache = torch.full((3, num_kv_heads, 4, head_dim), 7.0, dtype=run_dtype)
        v_cache = torch.full((3, num_kv_heads, 4, v_head_dim), 7.0, dtype=run_dtype)
        op(q, k, v, table, positions, k_cache, v_cache, slots, **{n: w.to(run_dtype) for n, w in weights.items()})
        results.append((q, k, k_cache, v_cache))
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    _, k, k_cache, v_cache = results[0]
    v = inputs(shape, dtype)[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(k_cache[slot // 4, :, slot % 4], k[token])
            assert torch.equal(v_cache[slot // 4, :, slot % 4], v[token])
    untouched = sorted(set(range(12)) - set(slots.tolist()))
    for slot in untouched:
        assert (k_cache[slot // 4, :, slot % 4] == 7.0).all()
        assert (v_cache[slot // 4, :, slot % 4] == 7.0).all()


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SHAPES[0], torch.float16), (SHAPES[2], torch.float32), (SHAPES[3], torch.float32), (SHAPES[3], torch.float16)],
)
def test_a_quantised_cache_gets_the_bytes_that_its_meaning_says(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    head_dim, rotary_dim, v_head_dim, _, num_kv_heads = shape
    table, positions = cos_sin_table(50, rotary_dim), torch.tensor([0, 3, 49, 7, 7, 20])
    slots = torch.tensor([4, -1, 11, 0, 5, 6])
    q, k, v = inputs(shape, dtype)
    v = v.clone()
    v[0] = 0.0  # a row of nothing but zeros
    v[2, 0, 1] = math.nan
    v[3, 0, 0] = math.inf
    v[4] *= torch.logspace(-6, 2, v_head_dim).to(dtype)  # numbers that become subnormal codes
    k_cache = torch.zeros(3, num_kv_heads, 4, row_width(head_dim, cache_dtype), dtype=torch.uint8).view(cache_dtype)
    v_cache = torch.zeros(3, num_kv_heads, 4, row_width(v_head_dim, cache_dtype), dtype=torch.uint8).view(cache_dtype)
    gpu.rotary_and_write(q, k, v, table, positions, k_cache, v_cache, slots, **weights_of(head_dim, dtype))
    for x, cache in ((k, k_cache), (v, v_cache)):
        rows = quantize_ref(x, cache_dtype)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                written = cache.view(torch.uint8)[slot // 4, :, slot % 4]
                meant = rows[token].view(torch.uint8)
                scales_are_nan = torch.isnan(meant[:, -4:].flatten().clone().view(torch.float32))
                assert torch.equal(written[:, :-4], meant[:, :-4])
                numbers = written[:, -4:].flatten().clone().view(torch.float32)
                assert torch.equal(torch.isnan(numbers), scales_are_nan)  # any NaN will do
                assert torch.equal(written[~scales_are_nan, -4:], meant[~scales_are_nan, -4:])


def test_every_float8_code_and_every_tie_between_two_is_rounded_as_torch_does() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((middles, middles.nextafter(torch.zeros(())), middles.nextafter(torch.full((), 1e9))))
    values = torch.cat((codes, near, torch.full((1,), 448.0)))
    values = torch.cat((values, -values))[: 2 * (len(values) // 2)]
    # Each row has 448 as its largest number, so that its scale is 1.
    v = torch.nn.functional.pad(values, (0, -len(values) % 15)).view(-1, 1, 15)
    v = torch.cat((v, torch.full((len(v), 1, 1), 448.0)), dim=-1)
    cache = torch.zeros(1, 1, len(v), 20, dtype=torch.uint8).view(torch.float8_e4m3fn)
    k = torch.zeros(len(v), 1, 16)
    gpu.rotary_and_write(
        k, k.clone(), v, cos_sin_table(2, 16), torch.zeros(len(v), dtype=torch.int64), cache.clone(), cache,
        torch.arange(len(v)),
    )  # fmt: skip
    assert torch.equal(cache.view(torch.uint8)[0, 0, :, :16], v[:, 0].to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_equals_that_token_in_a_batch(dtype: torch.dtype) -> None:
    table, positions = cos_sin_table(50, 64), torch.tensor([0, 3, 49, 7, 7, 20])
    q, k, v = inputs(SHAPES[0], dtype)
    weights = weights_of(64, dtype)
    gpu.rotary_and_write(q, k, v, table, positions, None, None, None, **weights)
    for token in range(6):
        q1, k1, v1 = (x[token : token + 1] for x in inputs(SHAPES[0], dtype))
        gpu.rotary_and_write(q1, k1, v1, table, positions[token : token + 1], None, None, None, **weights)
        assert torch.equal(q1, q[token : token + 1])
        assert torch.equal(k1, k[token : token + 1])


def test_no_tokens_are_no_work() -> None:
    q, k, v = inputs(SHAPES[0], torch.float32, num_tokens=0)
    empty = torch.zeros(0, dtype=torch.int64)
    cache = torch.zeros(1, 2, 4, 64)
    gpu.rotary_and_write(q, k, v, cos_sin_table(5, 64), empty, cache, cache.clone(), empty)
    assert not cache.any()


def test_a_slot_outside_the_cache_is_skipped_and_a_position_outside_the_table_reads_its_nearest_row() -> None:
    q, k, v = inputs(SHAPES[0], torch.float32)
    table = cos_sin_table(5, 64)
    caches = torch.zeros(2, 3, 2, 4, 64)
    slots = torch.tensor([12, -1, 2**40, -7, 3, 99])
    gpu.rotary_and_write(q, k, v, table, torch.tensor([0, 5, 4, -1, 2**40, 1]), caches[0], caches[1], slots)
    q2, k2, _ = inputs(SHAPES[0], torch.float32)
    rotary_and_write_ref(q2, k2, v, table, torch.tensor([0, 4, 4, 0, 4, 1]), None, None, None)
    torch.testing.assert_close(q, q2)
    written = caches.abs().sum(dim=(2, 4)) > 0  # [2, blocks, offsets]
    assert written.nonzero().tolist() == [[0, 0, 3], [1, 0, 3]]


def test_a_cache_of_another_dtype_gets_rounded_numbers() -> None:
    q, k, v = inputs(SHAPES[0], torch.float32)
    caches = torch.zeros(2, 2, 2, 4, 64, dtype=torch.float16)
    gpu.rotary_and_write(q, k, v, cos_sin_table(9, 64), torch.arange(6), caches[0], caches[1], torch.arange(6))
    assert torch.equal(caches[0].transpose(1, 2).reshape(8, 2, 64)[:6], k.half())
    assert torch.equal(caches[1].transpose(1, 2).reshape(8, 2, 64)[:6], v.half())


def test_half_a_cache_and_a_cache_of_another_width_are_refused() -> None:
    q, k, v = inputs(SHAPES[0], torch.float32)
    table, slots = cos_sin_table(9, 64), torch.arange(6)
    with pytest.raises(ValueError, match="belong together"):
        gpu.can(q, k, v, table, slots, torch.zeros(1, 2, 8, 64), None, None, None, None)
    with pytest.raises(ValueError, match="not made for"):
        gpu.rotary_and_write(q, k, v, table, slots, torch.zeros(1, 2, 8, 32), torch.zeros(1, 2, 8, 64), slots)
    with pytest.raises(ValueError, match="heads"):
        gpu.rotary_and_write(q, k, v, table, slots, torch.zeros(1, 3, 8, 64), torch.zeros(1, 3, 8, 64), slots)
