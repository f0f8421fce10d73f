"""Configurations read without `transformers`, beside the same ones read with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_models import save_tiny_model, tiny_config
from transformers import AutoConfig

from octavo.models.checkpoint import SHIPPED
from octavo.models.errors import UnsupportedModelError
from octavo.models.llama import LlamaForCausalLM
from octavo.models.plain_config import read_plain_config
from octavo.models.registry import DTYPES, load_model

# As the hub has them: Qwen3 0.6B, Qwen2.5 0.5B, and a Llama with neither head_dim nor attention_bias.
OLDER: dict[str, dict[str, Any]] = {
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.35.0",
        "use_cache": True,
        "vocab_size": 32000,
    },
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_read_alike(folder: Path) -> None:
    plain = read_plain_config(folder)
    theirs = AutoConfig.from_pretrained(folder)
    assert plain is not None
    fields = msgspec.structs.asdict(plain)
    dtype = fields.pop("dtype")
    assert (DTYPES[dtype] if dtype else None) == theirs.dtype
    # What a class does not have is never read of it; head_dim has the same default wherever it is read.
    absent = {"attention_bias": False, "mlp_bias": False, "sliding_window": None}
    absent |= {"layer_types": ["full_attention"] * plain.num_hidden_layers}
    absent |= {"head_dim": plain.hidden_size // plain.num_attention_heads}
    assert fields == {name: getattr(theirs, name, absent.get(name)) for name in fields}


@pytest.mark.parametrize("model_type", OLDER)
@pytest.mark.parametrize("age", ["older", "newer"])
def test_a_plain_configuration_reads_the_same_without_transformers(model_type: str, age: str, tmp_path: Path) -> None:
    if age == "older":
        write(tmp_path, OLDER[model_type])
    else:
        AutoConfig.for_model(**OLDER[model_type]).save_pretrained(tmp_path)
    assert_read_alike(tmp_path)


@pytest.mark.parametrize("name", ["leaf-4m", "leaf-draft"])
def test_the_shipped_models_have_plain_configurations(name: str) -> None:
    assert_read_alike(SHIPPED / name)


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_theta": None}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}, "rope_theta": None}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("llama", {"auto_map": {"AutoConfig": "config.Mine"}}),
        ("llama", {"layer_types": ["full_attention"] * 22}),
        ("llama", {"num_attention_heads": 24}),
        ("llama", {"num_key_value_heads": None}),
        ("llama", {"hidden_size": "2048"}),
        ("llama", {"vocab_size": 0}),
        ("llama", {"initializer_range": 2.0}),
        ("llama", {"eos_token_id": "2"}),
        ("llama", {"torch_dtype": "float64"}),
        ("llama", {"dtype": "float16"}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen2", {"layer_types": ["sliding_attention"] * 24}),
        ("qwen3", {"head_dim": None}),
        ("mistral", {}),
        ("gemma2", {}),
        ("gpt2", {}),
    ],
)
def test_what_is_not_plain_is_left_to_transformers(model_type: str, change: dict[str, Any], tmp_path: Path) -> None:
    if model_type in OLDER:
        config = {**OLDER[model_type], **change}
        write(tmp_path, config)
    else:
        tiny_config(model_type).save_pretrained(tmp_path)
    assert read_plain_config(tmp_path) is None


def test_a_broken_or_missing_file_is_left_to_transformers(tmp_path: Path) -> None:
    assert read_plain_config(tmp_path) is None
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert read_plain_config(tmp_path) is None


def test_an_option_that_the_native_class_lacks_still_goes_to_transformers(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, hidden_act="relu6")
    assert read_plain_config(tmp_path) is not None
    with pytest.raises(UnsupportedModelError, match="cannot be served natively"):
        load_model(tmp_path, model_impl="native")
    assert not isinstance(load_model(tmp_path), LlamaForCausalLM)
