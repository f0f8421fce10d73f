"""ggml's blocks through the C kernels, beside what they mean."""

from __future__ import annotations

import pytest
import torch
from c_library import needs_c

from octavo.kernels import gguf_blocks
from octavo.kernels.gguf_blocks import LAYOUTS, decode_blocks, pack_blocks
from octavo.kernels.linear_quantized import linear_quantized
from octavo.kernels.quantized_weight import QuantizedWeight, concatenate
from octavo.models.gguf.dequantize import QUANTIZED
from octavo.models.gguf.packed import packed_weight, packed_weight_ref
from octavo.models.gguf.tensor_types import TENSOR_TYPES
from octavo.models.quantization.partition import part_of

TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}


def random_rows(name: str, num_rows: int, num_blocks: int) -> torch.Tensor:
    """Every byte at random, but for float16 factors that are neither infinite nor NaN."""
    generator = torch.Generator().manual_seed(7)
    kind = TYPES[name]
    blocks = torch.randint(0, 256, (num_rows, num_blocks, kind.block_bytes), generator=generator, dtype=torch.uint8)
    for at in {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(name, (0,)):
        factor = torch.randn(num_rows, num_blocks, 1, generator=generator).half()
        blocks[:, :, at : at + 2] = factor.view(torch.uint8)
    return blocks.view(num_rows, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_says_what_the_type_of_tensors_says(name: str) -> None:
    layout, kind = LAYOUTS[name], TYPES[name]
    assert (layout.block_size, layout.block_bytes) == (kind.block_size, kind.block_bytes)
    assert TENSOR_TYPES[layout.number] is kind


@needs_c
@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_weights_are_those_that_torch_makes_byte_for_byte(name: str, num_blocks: int) -> None:
    rows = random_rows(name, 5, num_blocks)
    ours, meant = pack_blocks(rows, name), packed_weight_ref(rows, TYPES[name])
    assert ours is not None
    assert (ours.bits, ours.group_size, ours.in_features) == (meant.bits, meant.group_size, meant.in_features)
    assert torch.equal(ours.codes, meant.codes)
    plain = ours.with_plain_factors()
    for mine, theirs in ((plain.scales, meant.scales), (plain.offsets, meant.offsets)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.dtype is theirs.dtype
            assert torch.equal(mine, theirs)


@needs_c
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 40])
@pytest.mark.parametrize(("dtype", "quick"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_factors_kept_as_whole_numbers_give_the_bits_of_factors_made_floats(
    name: str, dtype: torch.dtype, quick: bool, num_tokens: int
) -> None:
    weight = pack_blocks(random_rows(name, 37, 5), name)
    assert weight is not None and weight.superblock_scales is not None
    x = torch.randn(num_tokens, weight.in_features, generator=torch.Generator().manual_seed(3)).to(dtype)
    plain = weight.with_plain_factors()
    assert plain.superblock_scales is None and weight.num_bytes < plain.num_bytes
    assert torch.equal(linear_quantized(x, weight, quick=quick), linear_quantized(x, plain, quick=quick))
    assert torch.equal(weight.dequantize(), plain.dequantize())


@needs_c
def test_parts_of_matrices_with_whole_factors_keep_their_weights() -> None:
    first, second = (pack_blocks(random_rows("Q4_K", rows, 2), "Q4_K") for rows in (5, 3))
    assert first is not None and second is not None
    whole = concatenate([first, second])
    assert isinstance(whole, QuantizedWeight)
    assert torch.equal(whole.dequantize(), torch.cat((first.dequantize(), second.dequantize())))
    part = part_of(whole, slice(2, 7), slice(32, 96))
    assert torch.equal(part.dequantize(), whole.dequantize()[2:7, 32:96])
    sixes = pack_blocks(random_rows("Q6_K", 3, 2), "Q6_K")
    assert sixes is not None
    assert concatenate([first, sixes]) == (first, sixes)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_numbers_are_those_that_torch_makes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    blocks = random_rows(name, 9, 1)
    out = torch.empty(9 * TYPES[name].block_size, dtype=dtype)
    assert decode_blocks(blocks, name, out)
    assert torch.equal(out, QUANTIZED[name](blocks).values().view(-1).to(dtype))


def test_other_types_and_a_missing_library_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack_blocks(random_rows("Q2_K", 2, 1), "Q2_K") is None
    rows = random_rows("Q4_K", 2, 1)
    monkeypatch.setattr(gguf_blocks, "_kernels", lambda: None)
    assert pack_blocks(rows, "Q4_K") is None
    assert not decode_blocks(rows, "Q4_K", torch.empty(512))
    assert torch.equal(packed_weight(rows, TYPES["Q4_K"]).codes, packed_weight_ref(rows, TYPES["Q4_K"]).codes)
