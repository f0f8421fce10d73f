"""ggml's blocks through the C kernels, beside what they mean."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels import cpu_build, gguf_blocks
from octavo.kernels.gguf_blocks import LAYOUTS, decode_blocks, pack_blocks
from octavo.models.gguf.dequantize import QUANTIZED
from octavo.models.gguf.packed import packed_weight, packed_weight_ref
from octavo.models.gguf.tensor_types import TENSOR_TYPES

TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}
needs_c = pytest.mark.skipif(cpu_build.library() is None, reason="no C compiler: the torch path is all there is")


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
    for mine, theirs in ((ours.scales, meant.scales), (ours.offsets, meant.offsets)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.dtype is theirs.dtype
            assert torch.equal(mine, theirs)


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
