"""Random weights from a configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from paged_runner import run_paged
from tiny_models import random_token_ids, save_tiny_model

from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.models.decoder import Decoder
from octavo.models.errors import UnsupportedModelError
from octavo.models.quantization.reader import open_weights
from octavo.models.random_weights import RandomWeights
from octavo.models.registry import load_model, why_no_random_weights

CPU = torch.device("cpu")


def config_only(family: str, folder: Path) -> Path:
    save_tiny_model(family, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral", "gpt_oss"])
def test_a_configuration_alone_makes_a_model_that_computes(family: str, tmp_path: Path) -> None:
    model = load_model(config_only(family, tmp_path), dtype="float32", load_format="dummy")
    logits = run_paged(model, random_token_ids(9))
    assert logits.shape == (9, model.vocab_size)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_weights_are_a_function_of_name_and_seed_and_a_part_is_of_the_whole(tmp_path: Path) -> None:
    def reader_of(seed: int = 0):  # type: ignore[no-untyped-def]  # a reader, whose type is not the matter
        return open_weights(tmp_path, dtype=torch.float32, device=CPU, quantization=RandomWeights(seed))

    whole = reader_of().take_linear("a.weight", 30, 20)
    assert torch.equal(reader_of().take_linear("a.weight", 30, 20, rows=slice(4, 9)), whole[4:9])
    assert torch.equal(reader_of().take_linear("a.weight", 30, 20, columns=slice(4, 9)), whole[:, 4:9])
    assert not torch.equal(reader_of(1).take_linear("a.weight", 30, 20), whole)
    assert not torch.equal(reader_of().take_linear("b.weight", 30, 20), whole)
    fused = reader_of().take_fused_linear(("b.weight", "a.weight"), ((7, 20), (30, 20)))
    assert torch.equal(fused[7:], whole)
    assert abs(float(whole.std()) - 0.02) < 0.005
    assert reader_of().take("x.layernorm.weight", 8).eq(1.0).all()
    assert reader_of().take("x.bias", 8).eq(0.0).all()


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 4)])
def test_random_weights_are_quantised_as_a_checkpoint_s_would_be(
    quantization: Literal["int8", "int4"], bits: int, tmp_path: Path
) -> None:
    model = load_model(config_only("qwen3", tmp_path), dtype="float32", load_format="dummy", quantization=quantization)
    assert isinstance(model, Decoder)
    weights = [layer.attention.qkv for layer in model.layers]
    assert all(isinstance(weight, QuantizedWeight) and weight.bits == bits for weight in weights)
    logits = run_paged(model, random_token_ids(9))
    assert torch.isfinite(logits).all()
    floating = run_paged(load_model(tmp_path, dtype="float32", load_format="dummy"), random_token_ids(9))
    assert torch.nn.functional.cosine_similarity(logits, floating).min() > (0.99 if bits == 8 else 0.8)


def test_what_cannot_be_random_is_refused_with_advice(tmp_path: Path) -> None:
    config_only("llama", tmp_path)
    assert why_no_random_weights(tmp_path) == ""
    assert "no native implementation" in why_no_random_weights(tmp_path, model_impl="transformers")
    with pytest.raises(UnsupportedModelError, match="no native implementation"):
        load_model(tmp_path, load_format="dummy", model_impl="transformers")
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    assert "GGUF file" in why_no_random_weights(file)
