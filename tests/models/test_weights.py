import json
from pathlib import Path

import pytest
import torch
from c_library import HAS_C
from paged_runner import run_paged
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model, random_token_ids, reference_logits, save_tiny_model
from transformers import AutoModelForCausalLM

from octavo.models.errors import WeightsError
from octavo.models.registry import load_model
from octavo.models.weights import WeightReader, checkpoint_dtype, weight_files

CPU = torch.device("cpu")


def reader_of(folder: Path, dtype: torch.dtype = torch.float32) -> WeightReader:
    return WeightReader(folder, dtype=dtype, device=CPU)


def test_a_sharded_checkpoint_loads_like_one_file(tmp_path: Path) -> None:
    reference = build_tiny_model("qwen3")
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(weight_files(tmp_path)) > 2
    token_ids = random_token_ids(12)
    model = load_model(tmp_path, dtype="float32", model_impl="native")
    torch.testing.assert_close(
        run_paged(model, token_ids), reference_logits(reference, token_ids), atol=1e-4, rtol=1e-4
    )


def test_all_missing_unexpected_and_misshapen_tensors_are_named_in_one_error(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(63, 64)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # recomputed, hence no complaint
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_model(tmp_path, dtype="float32", model_impl="native")
    error = caught.value
    assert error.missing == ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    assert error.unexpected == ("model.layers.0.self_attn.q_proj.bias",)
    assert error.mismatched == ("model.layers.0.self_attn.q_proj.weight",)
    for words in ("2 tensors are missing", "model.norm.weight", "[63, 64] instead of [64, 64]", "q_proj.bias"):
        assert words in str(error)


def test_tensors_are_cast_and_do_not_share_memory_with_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.5, 2.5]), "b": torch.tensor([3.5])}, tmp_path / "model.safetensors")
    with reader_of(tmp_path) as same, reader_of(tmp_path, torch.bfloat16) as half:
        first, second = same.take("a", 2), same.take("a", 2)
        assert half.take("a", 2).dtype == torch.bfloat16
        assert half.take_fused(["a", "b"], [(2,), (1,)]).tolist() == [1.5, 2.5, 3.5]
    first.zero_()
    assert second.tolist() == [1.5, 2.5]


def test_integer_tensors_are_refused_as_weights(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1, 2])}, tmp_path / "model.safetensors")
    with reader_of(tmp_path) as reader:
        reader.take("a", 2)
        with pytest.raises(WeightsError, match=r"torch.int64 instead of floating point"):
            reader.finish()


def test_the_only_safetensors_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1, dtype=torch.float16)}, tmp_path / "weights.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert weight_files(tmp_path) == (tmp_path / "weights.safetensors",)
    assert checkpoint_dtype(tmp_path) == torch.float16


def test_pickled_weights_are_refused_with_advice_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(WeightsError, match=r"pytorch_model.bin.*can run any code.*save_pretrained"):
        weight_files(tmp_path)


def test_folders_without_usable_weights_say_what_there_is_instead(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has no weights"):
        weight_files(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(WeightsError, match="GGUF"):
        weight_files(tmp_path)
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(WeightsError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "lacks 2 of the 2 weight files"),
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside its folder"),
        ({}, "not a safetensors index"),
        ([], "not a safetensors index"),
    ],
)
def test_a_bad_index_is_refused(index: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message):
        weight_files(tmp_path)


def test_a_cut_off_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(WeightsError, match=r"model.safetensors is not a whole safetensors file"):
        reader_of(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_matrices_stored_in_16_bits_stay_so_and_float32_logits_are_those_of_the_widened_model(
    model_type: str, tmp_path: Path
) -> None:
    build_tiny_model(model_type, tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    token_ids = random_token_ids(12)
    model = load_model(tmp_path, dtype="float32", model_impl="native")
    kept = torch.bfloat16 if HAS_C else torch.float32
    assert model.layers[0].attention.qkv.dtype is kept
    assert model.layers[0].input_norm.dtype is torch.float32
    assert model.vocabulary.head is model.vocabulary.embedding
    torch.testing.assert_close(
        run_paged(model, token_ids), reference_logits(reference, token_ids), atol=1e-4, rtol=1e-4
    )
