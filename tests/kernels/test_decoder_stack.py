"""All layers in one call, beside each operation called by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from c_library import needs_c
from packed_in_torch import PanelsInTorch

from octavo.kernels import linear_packed
from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.attention_kind import AttentionKind
from octavo.kernels.decoder_stack import DecoderStack, StackLayer, StackProduct, decoder_stack
from octavo.kernels.gated_activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.kv_quantization import row_width
from octavo.kernels.linear_dense import linear_dense, linear_dense_quick
from octavo.kernels.linear_packed import PackedWeight
from octavo.kernels.linear_quantized import linear_quantized
from octavo.kernels.linear_rounded import RoundedWeight, linear_rounded, round_weight
from octavo.kernels.paged_attention import paged_attention, write_kv
from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.kernels.rms_norm import rms_norm
from octavo.kernels.rotary import rotary_and_write
from octavo.kernels.weight_quantization import quantize

pytestmark = needs_c

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 96, 4, 2, 16, 80
BLOCK_SIZE, NUM_BLOCKS = 4, 12
Caches = list[tuple[torch.Tensor, torch.Tensor]]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * (0.2 if len(shape) == 2 else 1.0)).to(dtype)


def plain_layer(dtype: torch.dtype, seed: int = 0) -> StackLayer:
    def product(out_features: int, in_features: int, number: int) -> StackProduct:
        return StackProduct(randn(out_features, in_features, dtype=dtype, seed=10 * seed + number))

    angles = torch.arange(64)[:, None] * 0.3 ** torch.arange(HEAD_DIM // 2)
    return StackLayer(
        qkv=product((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, 1),
        o=product(HIDDEN, HEADS * HEAD_DIM, 2),
        gate_up=product(2 * INNER, HIDDEN, 3),
        down=product(HIDDEN, INNER, 4),
        before_attention=randn(HIDDEN, dtype=dtype, seed=seed + 5),
        before_mlp=randn(HIDDEN, dtype=dtype, seed=seed + 6),
        eps=1e-6,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        attention=AttentionKind(0.3),
        activation=silu_and_mul,
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=-1),
    )


def variants(dtype: torch.dtype) -> dict[str, StackLayer]:
    plain = plain_layer(dtype)
    wide = [randn(rows, HIDDEN, dtype=torch.float32, seed=40 + rows) for rows in (64, 32, 32)]
    eight, four = quantize(wide[0], bits=8, group_size=32), quantize(wide[1], bits=4, group_size=32)
    return {
        "plain": plain,
        "norms of heads": replace(
            plain,
            q_norm=randn(HEAD_DIM, dtype=dtype, seed=21),
            k_norm=randn(HEAD_DIM, dtype=dtype, seed=22),
            qk_eps=1e-5,
        ),
        "biases": replace(
            plain,
            qkv=StackProduct(plain.qkv.weight, randn(128, dtype=dtype, seed=23)),
            o=StackProduct(plain.o.weight, randn(HIDDEN, dtype=dtype, seed=24)),
            gate_up=StackProduct(plain.gate_up.weight, randn(2 * INNER, dtype=dtype, seed=25)),
            down=StackProduct(plain.down.weight, randn(HIDDEN, dtype=dtype, seed=26)),
        ),
        "four norms in float32, gelu": replace(
            plain,
            **{
                name: randn(HIDDEN, dtype=torch.float32, seed=30 + index)
                for index, name in enumerate(("before_attention", "after_attention", "before_mlp", "after_mlp"))
            },
            activation=gelu_tanh_and_mul,
        ),
        "nothing turns": replace(plain, cos_sin=None),
        "window, cap and sinks": replace(
            plain, attention=AttentionKind(0.7, 5, 2.0, sinks=torch.linspace(-1.0, 1.0, HEADS))
        ),
        "parts of several kinds": replace(plain, qkv=StackProduct((eight, four, wide[2].bfloat16()))),
    }


def multiplied(product: StackProduct, x: torch.Tensor) -> torch.Tensor:
    parts = product.weight if isinstance(product.weight, tuple) else (product.weight,)

    def by(part: torch.Tensor | QuantizedWeight | PackedWeight | RoundedWeight) -> torch.Tensor:
        match part:
            case QuantizedWeight():
                return linear_quantized(x, part)
            case PackedWeight():
                return linear_packed.linear_packed(x, part)
            case RoundedWeight():
                return linear_rounded(x, part)
            case _:
                return linear_dense(x, part)

    out = torch.cat([by(part) for part in parts], dim=-1)
    return out if product.bias is None else out.add_(product.bias)


def one_by_one(
    layers: list[StackLayer], x: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, caches: Caches
) -> None:
    for layer, (k_cache, v_cache) in zip(layers, caches, strict=True):
        qkv = multiplied(layer.qkv, rms_norm(x, layer.before_attention, layer.eps)).view(len(x), -1, HEAD_DIM)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        if layer.cos_sin is None:
            write_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        else:
            rotary_and_write(
                *(q, k, v, layer.cos_sin, positions, k_cache, v_cache, batch.slot_mapping),
                q_weight=layer.q_norm,
                k_weight=layer.k_norm,
                eps=layer.qk_eps,
            )
        attended = paged_attention(q, k_cache, v_cache, batch, layer.attention)
        out = multiplied(layer.o, attended.view(len(x), -1))
        x += out if layer.after_attention is None else rms_norm(out, layer.after_attention, layer.eps)
        inner = layer.activation(multiplied(layer.gate_up, rms_norm(x, layer.before_mlp, layer.eps)))
        out = multiplied(layer.down, inner)
        x += out if layer.after_mlp is None else rms_norm(out, layer.after_mlp, layer.eps)


def empty_caches(num_layers: int, dtype: torch.dtype) -> Caches:
    shape = (NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, row_width(HEAD_DIM, dtype))
    return [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(num_layers)]


def step_of(starts: list[int], counts: list[int], num_padding: int = 1) -> tuple[torch.Tensor, AttentionBatch]:
    """Rows of five blocks each, at their contexts' ends, and tokens of no row behind them."""
    positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
    tables = [[(5 * row + i) % NUM_BLOCKS for i in range(5)] for row in range(len(starts))]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    slots = [
        tables[row][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for row, at in zip(rows, positions, strict=True)
    ]
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    contexts = [start + count for start, count in zip(starts, counts, strict=True)]
    batch = AttentionBatch(
        query_start=torch.tensor(ends, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slot_mapping=torch.tensor([*slots, *[-1] * num_padding]),
        block_size=BLOCK_SIZE,
        max_query_len=max(counts),
        max_context_len=max(contexts),
        num_decodes=0,
    )
    return torch.tensor([*positions, *[0] * num_padding]), batch


def made(layers: list[StackLayer], dtype: torch.dtype) -> DecoderStack:
    stack = decoder_stack(layers, dtype=dtype)
    assert stack is not None
    return stack


STEPS = (([0, 0], [9, 6], 1), ([9, 6], [1, 1], 0), ([10], [1], 0))  # the last is of one token, parts lie in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", variants(torch.float32))
def test_one_call_gives_the_bits_of_its_operations(name: str, dtype: torch.dtype) -> None:
    layers = [variants(dtype)[name], plain_layer(dtype, seed=1), variants(dtype)[name]]
    stack, caches, expected_caches = made(layers, dtype), empty_caches(3, dtype), empty_caches(3, dtype)
    for starts, counts, num_padding in STEPS:
        positions, batch = step_of(starts, counts, num_padding)
        x = randn(len(positions), HIDDEN, dtype=dtype, seed=len(positions))
        expected = x.clone()
        stack.run(x, positions, batch, caches)
        one_by_one(layers, expected, positions, batch, expected_caches)
        assert torch.equal(x, expected)
        assert x.isfinite().all()
    for got, wanted in zip(caches, expected_caches, strict=True):
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


def test_a_quick_one_multiplies_many_rows_as_quick_products_do(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [plain_layer(torch.bfloat16), plain_layer(torch.bfloat16, seed=1)]
    positions, batch = step_of([0, 0], [15, 14])
    start = randn(30, HIDDEN, dtype=torch.bfloat16, seed=3)
    quick, exact, expected = start.clone(), start.clone(), start.clone()
    stack = decoder_stack(layers, dtype=torch.bfloat16, quick=True)
    assert stack is not None
    stack.run(quick, positions, batch, empty_caches(2, torch.bfloat16))
    made(layers, torch.bfloat16).run(exact, positions, batch, empty_caches(2, torch.bfloat16))
    monkeypatch.setitem(globals(), "linear_dense", linear_dense_quick)
    one_by_one(layers, expected, positions, batch, empty_caches(2, torch.bfloat16))
    assert torch.equal(quick, expected)
    assert (quick - exact).norm() <= 0.02 * exact.norm()  # roundings to bfloat16 that fell out otherwise


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
def test_so_it_does_with_a_quantised_cache(cache_dtype: torch.dtype) -> None:
    layers = [plain_layer(torch.float32)]
    caches, expected_caches = empty_caches(1, cache_dtype), empty_caches(1, cache_dtype)
    positions, batch = step_of([0, 0], [9, 6])
    x = randn(16, HIDDEN, dtype=torch.float32, seed=3)
    expected = x.clone()
    made(layers, torch.float32).run(x, positions, batch, caches)
    one_by_one(layers, expected, positions, batch, expected_caches)
    assert torch.equal(x, expected)
    assert torch.equal(caches[0][1].view(torch.uint8), expected_caches[0][1].view(torch.uint8))


def test_it_writes_to_the_caches_of_each_call() -> None:
    stack = made([plain_layer(torch.float32)], torch.float32)
    positions, batch = step_of([0], [3])
    for _ in range(2):
        caches = empty_caches(1, torch.float32)
        stack.run(randn(4, HIDDEN, dtype=torch.float32, seed=1), positions, batch, caches)
        assert caches[0][0].any()


def test_a_position_or_slot_outside_is_an_error_and_changes_nothing() -> None:
    for layer in (plain_layer(torch.float32), replace(plain_layer(torch.float32), cos_sin=None)):
        stack, caches = made([layer], torch.float32), empty_caches(1, torch.float32)
        positions, batch = step_of([0], [3])
        x = randn(4, HIDDEN, dtype=torch.float32, seed=1)
        before = x.clone()
        if layer.cos_sin is not None:
            with pytest.raises(IndexError, match="position is outside"):
                stack.run(x, positions + 64, batch, caches)
        slots = batch.slot_mapping + NUM_BLOCKS * BLOCK_SIZE
        with pytest.raises(IndexError, match=f"outside the cache's {NUM_BLOCKS * BLOCK_SIZE} slots"):
            stack.run(x, positions, replace(batch, slot_mapping=slots), caches)
        assert torch.equal(x, before)
        assert not caches[0][0].any()


def test_packed_weights_are_of_the_stacks_dtype_and_multiply_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_packed, "_LEAST_BYTES", 0)
    plain = plain_layer(torch.bfloat16)
    assert isinstance(plain.o.weight, torch.Tensor)
    held = linear_packed.Packer(PanelsInTorch(16)).pack(plain.o.weight)
    assert held is not None
    layer = replace(plain, o=StackProduct(held, randn(HIDDEN, dtype=torch.bfloat16, seed=9)))
    assert decoder_stack([replace(plain_layer(torch.float32), o=StackProduct(held))], dtype=torch.float32) is None
    stack, caches, expected_caches = made([layer], torch.bfloat16), *[empty_caches(1, torch.bfloat16) for _ in range(2)]
    positions, batch = step_of([0, 0], [2, 2], num_padding=0)
    x = randn(4, HIDDEN, dtype=torch.bfloat16, seed=3)
    expected = x.clone()
    stack.run(x, positions, batch, caches)
    one_by_one([layer], expected, positions, batch, expected_caches)
    assert torch.equal(x, expected)
    positions, batch = step_of([0, 0], [3, 2], num_padding=0)
    with pytest.raises(AssertionError):
        stack.run(randn(5, HIDDEN, dtype=torch.bfloat16, seed=3), positions, batch, caches)


def test_rounded_weights_are_of_bfloat16_and_give_the_bits_of_their_operation() -> None:
    plain = plain_layer(torch.bfloat16)
    held = round_weight(randn(HIDDEN, HEADS * HEAD_DIM, dtype=torch.bfloat16, seed=2))
    if held is None:
        pytest.skip("this processor multiplies bfloat16 otherwise")
    layer = replace(plain, o=StackProduct(held, randn(HIDDEN, dtype=torch.bfloat16, seed=9)))
    assert decoder_stack([replace(plain_layer(torch.float32), o=StackProduct(held))], dtype=torch.float32) is None
    stack, caches, expected_caches = made([layer], torch.bfloat16), *[empty_caches(1, torch.bfloat16) for _ in range(2)]
    for starts, counts, num_padding in STEPS:
        positions, batch = step_of(starts, counts, num_padding)
        x = randn(len(positions), HIDDEN, dtype=torch.bfloat16, seed=len(positions))
        expected = x.clone()
        stack.run(x, positions, batch, caches)
        one_by_one([layer], expected, positions, batch, expected_caches)
        assert torch.equal(x, expected)


def test_what_has_no_c_kernel_is_no_stack() -> None:
    plain = plain_layer(torch.float32)
    ordered = replace(
        quantize(randn(128, HIDDEN, dtype=torch.float32, seed=1), bits=8, group_size=32),
        input_order=torch.arange(HIDDEN).flip(0),
    )
    for unfit in (
        replace(plain, activation=torch.relu),
        replace(plain, qkv=StackProduct(ordered)),
        replace(plain, before_mlp=plain.before_mlp.double()),
        replace(plain, before_mlp=plain.before_mlp.bfloat16()),
        replace(plain, down=StackProduct(torch.zeros(INNER, HIDDEN).T)),
        replace(plain, attention=AttentionKind(0.3, sinks=torch.zeros(HEADS, dtype=torch.bfloat16))),
        replace(plain, attention=AttentionKind(0.3, alibi_slopes=torch.ones(HEADS))),
        replace(plain, o=StackProduct(plain.o.weight, torch.zeros(HIDDEN, dtype=torch.bfloat16))),
    ):
        assert decoder_stack([plain, unfit], dtype=torch.float32) is None
    assert decoder_stack([plain], dtype=torch.float64) is None
    assert decoder_stack([plain], dtype=torch.float32) is not None
