"""Tensors under a checkpoint's names, and models built of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from c_library import HAS_C
from paged_runner import greedy_paged, run_paged
from safetensors.torch import load_file
from tiny_gguf import F32, U32, Raw, convert_checkpoint, encoded
from tiny_models import random_token_ids, reference_logits, save_tiny_model

from octavo.kernels import cpu_build
from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.models.checkpoint import SHIPPED, resolve_checkpoint
from octavo.models.errors import ModelLoadError, ModelNotFoundError, UnsupportedModelError, WeightsError
from octavo.models.gguf import packed
from octavo.models.gguf.dequantize import dequantize
from octavo.models.gguf.packed import packed_weight
from octavo.models.gguf.tensor_types import TENSOR_TYPES
from octavo.models.gguf.weights import GGUFWeights
from octavo.models.registry import load_model

LEAF = SHIPPED / "leaf-4m"
KINDS = {kind.name: kind for kind in TENSOR_TYPES.values()}

GEMMA_KEYS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "gemma2.attention.sliding_window": U32(8),
        "gemma2.attn_logit_softcapping": F32(50.0),
        "gemma2.final_logit_softcapping": F32(30.0),
    },
    "gemma3_text": {
        "gemma3.attention.sliding_window": U32(8),
        "gemma3.attention.sliding_window_pattern": U32(3),
        "gemma3.rope.freq_base": F32(1e6),
    },
}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_file_holds_the_checkpoint_s_tensors_under_its_names(model_type: str, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path)
    path = convert_checkpoint(tmp_path, tmp_path / "m.gguf", tokenizer={})
    expected = load_file(tmp_path / "model.safetensors")
    with GGUFWeights(path, torch.float32) as weights:
        assert set(weights.keys()) == set(expected)
        for name, tensor in expected.items():
            assert weights.get_slice(name).get_shape() == list(tensor.shape)
            # Gemma's factors have had one added, which costs their last bits.
            torch.testing.assert_close(
                weights.get_tensor(name), tensor, rtol=0, atol=2e-7 if model_type.startswith("gemma") else 0
            )


def test_queries_and_keys_of_llama_are_put_back_in_order_with_their_biases(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, attention_bias=True, mlp_bias=True, num_key_value_heads=1)
    path = convert_checkpoint(tmp_path, tmp_path / "m.gguf", tokenizer={})
    expected = load_file(tmp_path / "model.safetensors")
    with GGUFWeights(path, torch.float32) as weights:
        for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"):
            name = f"model.layers.0.self_attn.{name}"
            assert torch.equal(weights.get_tensor(name), expected[name])


def test_quantised_rows_are_put_back_in_order_too(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    path = convert_checkpoint(tmp_path, tmp_path / "m.gguf", kind="Q8_0", tokenizer={})
    expected = load_file(tmp_path / "model.safetensors")
    with GGUFWeights(path, torch.float32) as weights:
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            step = expected[name].abs().max() / 127
            torch.testing.assert_close(weights.get_tensor(name), expected[name], rtol=0, atol=0.6 * step.item())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_model_of_a_file_computes_what_transformers_computes(model_type: str, tied: bool, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]}
    fields = fields if model_type == "gemma3_text" else {}
    if model_type == "gemma3_text":
        fields["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    reference = save_tiny_model(model_type, tmp_path, seed=2, tie_word_embeddings=tied, **fields)
    path = convert_checkpoint(tmp_path, tmp_path / "m.gguf", tokenizer={}, extra=GEMMA_KEYS.get(model_type, {}))
    model = load_model(path, dtype="float32")
    token_ids = random_token_ids(40, seed=3)
    torch.testing.assert_close(
        run_paged(model, token_ids, chunks=(23, 17)), reference_logits(reference, token_ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_the_shipped_model_says_the_same_tokens_from_a_file(kind: str, tmp_path: Path) -> None:
    # F16 holds what bfloat16 weights of this size hold, but for the smallest.
    ours = load_model(convert_checkpoint(LEAF, tmp_path / "leaf.gguf", kind=kind), dtype="float32")
    theirs = load_model(LEAF, dtype="float32")
    for seed in range(3):
        prompt = random_token_ids(12, seed=seed)
        assert greedy_paged(ours, prompt, 24) == greedy_paged(theirs, prompt, 24)


def test_logits_in_q8_0_are_close_to_the_exact_ones(tmp_path: Path) -> None:
    ours = load_model(convert_checkpoint(LEAF, tmp_path / "leaf.gguf", kind="Q8_0"), dtype="float32")
    theirs = load_model(LEAF, dtype="float32")
    prompt = random_token_ids(8, seed=1)
    token_ids = prompt + greedy_paged(theirs, prompt, 56)
    exact = run_paged(theirs, token_ids)
    found = run_paged(ours, token_ids)
    error = (found - exact).pow(2).mean().sqrt() / exact.std()
    assert 1e-5 < error < 0.02
    assert (found.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_blocks_of_256_are_decoded_into_a_model(tmp_path: Path) -> None:
    # Every scale 1 and every minimum 0, so that a weight is its four bits.
    d_and_scales = np.array([1.0, 0.0], "<f2").tobytes() + bytes([1] * 4 + [0] * 4 + [1] * 4)
    block = d_and_scales + bytes(range(128))
    queries = Raw("Q4_K", (256, 256), block * 256)
    path = convert_checkpoint(LEAF, tmp_path / "leaf.gguf", kinds={"blk.1.attn_q.weight": queries})
    with GGUFWeights(path, torch.float32) as weights:
        tensor = weights.get_tensor("model.layers.1.self_attn.q_proj.weight")
    low = torch.tensor([byte & 15 for byte in range(32)]).float()
    assert torch.equal(tensor[7, :32], low)
    assert torch.equal(tensor[255, 32:64], torch.tensor([byte >> 4 for byte in range(32)]).float())


def test_an_unsupported_type_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    foreign = Raw("IQ4_XS", (256, 256), bytes(136 * 256))
    path = convert_checkpoint(LEAF, tmp_path / "leaf.gguf", kinds={"blk.1.attn_q.weight": foreign})
    with pytest.raises(UnsupportedModelError, match=r"'blk\.1\.attn_q\.weight' is of type IQ4_XS.*Q4_K, Q5_K, Q6_K"):
        load_model(path)


def test_quantised_tensors_of_an_older_version_are_refused(tmp_path: Path) -> None:
    path = convert_checkpoint(LEAF, tmp_path / "leaf.gguf", kind="Q8_0", extra={"general.quantization_version": U32(1)})
    with pytest.raises(UnsupportedModelError, match="of version 1; version 2 is read"):
        load_model(path)


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    wrong = {"blk.2.ffn_down.weight": encoded(np.ones((256, 32)), "F32")}
    extra = {"blk.9.ffn_up.weight": encoded(np.ones((2, 2)), "F32"), "mtp.x": encoded(np.ones(2), "F32")}
    path = convert_checkpoint(LEAF, tmp_path / "leaf.gguf", kinds=wrong, extra_tensors=extra)
    with pytest.raises(WeightsError, match="do not fit its metadata") as caught:
        load_model(path)
    assert caught.value.mismatched == ("model.layers.2.mlp.down_proj.weight",)
    assert set(caught.value.unexpected) == {"model.layers.9.mlp.up_proj.weight", "mtp.x"}


def test_a_gguf_file_is_served_natively_alone(tmp_path: Path) -> None:
    path = convert_checkpoint(LEAF, tmp_path / "leaf.gguf")
    with pytest.raises(UnsupportedModelError, match="served natively"):
        load_model(path, model_impl="transformers")


def test_a_file_a_folder_with_one_and_no_other_stand_for_the_file(tmp_path: Path) -> None:
    path = convert_checkpoint(LEAF, tmp_path / "leaf.gguf").resolve()
    assert resolve_checkpoint(path) == resolve_checkpoint(str(path)) == path
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(tmp_path, weights=False) == path
    (tmp_path / "tokenizer.json").touch()
    assert resolve_checkpoint(tmp_path, weights=False) == tmp_path.resolve()
    assert resolve_checkpoint(tmp_path) == path
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ModelLoadError, match=r"2 GGUF files.*leaf\.gguf, other\.gguf"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve_checkpoint(tmp_path) == tmp_path.resolve()
    with pytest.raises(ModelNotFoundError, match="there is no file"):
        resolve_checkpoint("nothing.gguf")
    with pytest.raises(ModelLoadError, match="leave it out"):
        resolve_checkpoint(path, revision="main")


BLOCK_FLOATS = {
    **{"Q4_0": (1,), "Q4_1": (1, 3), "Q5_0": (1,), "Q5_1": (1, 3), "Q8_0": (1,), "Q2_K": (81, 83)},
    **{"Q3_K": (109,), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,)},
}


@pytest.mark.parametrize("name", BLOCK_FLOATS)
def test_a_packed_matrix_stands_for_the_very_values(name: str) -> None:
    kind = KINDS[name]
    raw = np.random.default_rng(8).integers(0, 256, (7 * 512 // kind.block_size, kind.block_bytes), np.uint8)
    for at in BLOCK_FLOATS[name]:
        raw[:, at] &= 0xBB  # finite
    rows = torch.from_numpy(raw).view(7, -1)
    exact = torch.empty(7 * 512)
    dequantize(torch.from_numpy(raw), kind, exact)
    weight = packed_weight(rows, kind)
    assert weight.shape == (7, 512)
    assert weight.bits == (4 if name.startswith("Q4") else 8)
    assert torch.equal(weight.dequantize(torch.float32), exact.view(7, 512))


def test_a_matrix_of_many_chunks_is_packed_to_its_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.from_numpy(np.random.default_rng(9).integers(0, 100, (11, 8 * 34), np.uint8))
    whole = packed_weight(raw, KINDS["Q8_0"])
    monkeypatch.setattr(packed, "_CHUNK_ELEMENTS", 600)
    assert torch.equal(packed_weight(raw, KINDS["Q8_0"]).dequantize(), whole.dequantize())


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_stay_packed_where_there_is_a_kernel_and_give_the_same_logits_where_not(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("qwen3", tmp_path, tie_word_embeddings=tied)
    path = convert_checkpoint(tmp_path, tmp_path / "m.gguf", kind="Q8_0", tokenizer={})
    token_ids = random_token_ids(24, seed=1)
    if HAS_C:
        kept = load_model(path, dtype="float32")
        assert isinstance(kept.layers[0].attention.qkv, QuantizedWeight)
        assert isinstance(kept.vocabulary.head, QuantizedWeight)
    else:
        kept = None
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    decoded = load_model(path, dtype="float32")
    assert isinstance(decoded.layers[0].attention.qkv, torch.Tensor)
    if kept is not None:
        torch.testing.assert_close(run_paged(kept, token_ids), run_paged(decoded, token_ids), atol=2e-4, rtol=2e-4)


def test_parts_of_different_types_lie_behind_each_other(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, seed=4)
    weights = load_file(tmp_path / "model.safetensors")
    exact = load_model(convert_checkpoint(tmp_path, tmp_path / "exact.gguf", tokenizer={}), dtype="float32")
    values = {"blk.0.attn_v.weight": encoded(weights["model.layers.0.self_attn.v_proj.weight"].numpy(), "Q8_0")}
    mixed = load_model(convert_checkpoint(tmp_path, tmp_path / "m.gguf", tokenizer={}, kinds=values), dtype="float32")
    token_ids = random_token_ids(16, seed=1)
    expected, found = run_paged(exact, token_ids), run_paged(mixed, token_ids)
    assert not torch.equal(found, expected)
    assert (found - expected).pow(2).mean().sqrt() < 0.02 * expected.std()
