"""Bytes of each tensor type: the quick decoder against the meaning, and both against ggml's own Python decoder."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from octavo.models.gguf import dequantize as quick
from octavo.models.gguf.dequantize_ref import MEANING, dequantize_ref
from octavo.models.gguf.tensor_types import TENSOR_TYPES, TensorType

KINDS = {kind.name: kind for kind in TENSOR_TYPES.values()}


def random_blocks(kind: TensorType, num_blocks: int, *, seed: int) -> np.ndarray:
    """Any bytes but for infinite or missing numbers where a float stands."""
    raw = np.random.default_rng(seed).integers(0, 256, (num_blocks, kind.block_bytes), np.uint8)
    floats = {
        **{"F32": (3,), "F16": (1,), "BF16": (1,), "Q4_0": (1,), "Q4_1": (1, 3), "Q5_0": (1,), "Q5_1": (1, 3)},
        **{"Q8_0": (1,), "Q2_K": (81, 83), "Q3_K": (109,), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,)},
    }
    for at in floats[kind.name]:
        raw[:, at] &= 0xBB if kind.name not in ("F32", "BF16") else 0xBF
    return raw


def decoded(raw: np.ndarray, kind: TensorType, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if kind.name in quick.PLAIN:
        return torch.from_numpy(raw).view(quick.PLAIN[kind.name]).view(-1).to(dtype)
    out = torch.empty(raw.shape[0] * kind.block_size, dtype=dtype)
    quick.dequantize(torch.from_numpy(raw), kind, out)
    return out


def test_each_type_with_a_meaning_has_a_quick_decoder() -> None:
    assert set(quick.DECODED) == set(MEANING)


@pytest.mark.parametrize("name", MEANING)
def test_the_quick_decoder_equals_the_meaning_bit_for_bit(name: str) -> None:
    kind = KINDS[name]
    raw = random_blocks(kind, 24, seed=1)
    meant = dequantize_ref(raw.tobytes(), name, kind.block_bytes)
    assert np.isfinite(meant).all()
    assert np.array_equal(decoded(raw, kind).numpy().view(np.int32), meant.view(np.int32))


@pytest.mark.parametrize("name", MEANING)
def test_the_meaning_equals_that_of_the_format_s_own_tools(name: str) -> None:
    kind = KINDS[name]
    raw = random_blocks(kind, 5, seed=2)
    number = gguf.GGMLQuantizationType[name]
    typed = raw.view({"F32": np.float32, "F16": np.float16}[name]) if name in ("F32", "F16") else raw
    theirs = gguf.quants.dequantize(typed, number).astype(np.float32).reshape(-1)
    assert np.array_equal(dequantize_ref(raw.tobytes(), name, kind.block_bytes).view(np.int32), theirs.view(np.int32))


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_gets_the_float32_values_rounded_once(name: str, dtype: torch.dtype) -> None:
    raw = random_blocks(KINDS[name], 9, seed=3)
    assert torch.equal(decoded(raw, KINDS[name], dtype), decoded(raw, KINDS[name]).to(dtype))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_K"])
def test_a_tensor_of_many_chunks_is_decoded_to_its_last_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks(KINDS[name], 33, seed=4)
    whole = decoded(raw, KINDS[name])
    monkeypatch.setattr(quick, "_CHUNK_ELEMENTS", 4 * KINDS[name].block_size)
    assert torch.equal(decoded(raw, KINDS[name]), whole)


def test_infinite_scales_give_infinite_or_missing_numbers_and_no_error() -> None:
    kind = KINDS["Q4_0"]
    raw = random_blocks(kind, 1, seed=5)
    raw[0, :2] = (0x00, 0x7C)
    assert np.array_equal(
        decoded(raw, kind).numpy(), dequantize_ref(raw.tobytes(), "Q4_0", kind.block_bytes), equal_nan=True
    )


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_quantised_weight_is_off_by_half_a_step_of_its_block_or_one_at_the_short_end(name: str) -> None:
    kind = KINDS[name]
    weight = np.random.default_rng(6).standard_normal((8, 64), np.float32)
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name]).reshape(-1, kind.block_bytes)
    error = np.abs(decoded(raw, kind).numpy() - weight.reshape(-1)).reshape(-1, 32)
    blocks = weight.reshape(-1, 32)
    span = np.abs(blocks).max(1) * 2 if name in ("Q4_0", "Q5_0", "Q8_0") else np.ptp(blocks, axis=1)
    num_steps = {"4": 15, "5": 31, "8": 254}[name[1]]
    # The range is not symmetric (-8 to 7): what lies at its short end is off by a whole step.
    allowed = 1.0 if name in ("Q4_0", "Q5_0") else 0.5
    assert (error.max(1) <= 1.07 * allowed * span / num_steps).all()
