import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from step_time_tools import TINY

from octavo.messages.errors import InvalidConfigError, ModelNotFoundError, UnsupportedModelError
from octavo.sim.step_time.config_shape import read_shape, shape_from_config
from octavo.sim.step_time.known_models import find_model
from octavo.sim.step_time.model_shape import ModelShape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3_MOE: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "mlp_only_layers": [],
    "sliding_window": None,
}
GEMMA2: dict[str, Any] = {
    **LLAMA,
    "model_type": "gemma2",
    "num_hidden_layers": 42,
    "hidden_size": 3584,
    "num_attention_heads": 16,
    "head_dim": 256,
    "vocab_size": 256000,
    "sliding_window": 4096,
}
del GEMMA2["tie_word_embeddings"]
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": 12,
    "n_embd": 768,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
QWEN2: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "sliding_window": 131072,
    "use_sliding_window": False,
}


@pytest.mark.parametrize(
    ("config", "num_params"),
    [
        (LLAMA, 8_030_261_248),
        (QWEN3_MOE, 30_532_122_624),
        ({**GEMMA2, "intermediate_size": 14336}, 9_241_705_984),
        (GPT2, 124_439_808),
        (QWEN2, 7_615_616_512),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_config_gives_the_checkpoints_parameters(config: dict[str, Any], num_params: int) -> None:
    assert shape_from_config(config).num_params == num_params


def test_a_config_gives_the_same_shape_as_the_known_model() -> None:
    known = find_model("llama-3.1-8b")  # whose names no config gives
    assert msgspec.structs.replace(shape_from_config(LLAMA), name=known.name, hub_name=known.hub_name) == known


def test_kv_bytes_count_layers_heads_and_both_of_key_and_value() -> None:
    shape = shape_from_config(LLAMA)
    assert shape.kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2
    assert shape.kv_bytes_per_token(4) == shape.kv_bytes_per_token() // 4
    assert shape.kv_bytes_per_token(16) == shape.kv_bytes_per_token() // 8  # a head is on two GPUs


def test_only_visited_experts_are_active() -> None:
    shape = find_model("mixtral-8x7b")
    assert 12.5e9 < shape.num_active_params < 13e9 < 46e9 < shape.num_params


@pytest.mark.parametrize(
    ("changes", "window", "num_layers"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096, 32),
        ({"model_type": "mistral", "sliding_window": None}, 0, 0),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 0, 0),
        ({"model_type": "gemma2", "sliding_window": 4096}, 4096, 16),
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6}, 512, 27),
        ({"layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 8}, 8, 16),
    ],
)
def test_the_layers_with_a_window_are_counted(changes: dict[str, Any], window: int, num_layers: int) -> None:
    shape = shape_from_config({**LLAMA, **changes})
    assert (shape.sliding_window, shape.num_sliding_layers) == (window, num_layers)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
    ],
)
def test_quantised_weights_keep_a_kv_cache_of_16_bits(quantization: dict[str, Any], dtype: str) -> None:
    shape = shape_from_config({**LLAMA, "quantization_config": quantization})
    assert (shape.weight_dtype, shape.kv_dtype) == (dtype, "bfloat16")
    assert shape.weight_bytes < shape_from_config(LLAMA).weight_bytes


def test_a_multimodal_config_counts_its_text_model() -> None:
    assert shape_from_config({"model_type": "x", "text_config": LLAMA}).num_layers == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers or n_layer.* is missing"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 5}, "must be a multiple of num_key_value_heads=5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"torch_dtype": "float8000"}, "dtype is 'float8000'"),
        ({"hidden_size": 8}, "leaves no dimension"),
        ({"num_experts": 4, "num_experts_per_tok": 9}, "num_active_experts=9"),
        ({"max_position_embeddings": 1}, "max_model_len=1"),
    ],
)
def test_a_bad_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"my-model: .*{message}"):
        shape_from_config({**LLAMA, **changes}, "my-model")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mamba2"},
        {"model_type": "new", "kv_lora_rank": 512},
        {"quantization_config": {"quant_method": "odd"}},
    ],
)
def test_what_is_not_modelled_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="not modelled"):
        shape_from_config({**LLAMA, **changes})


def test_a_file_is_read_and_a_bad_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ModelNotFoundError, match="there is no"):
        read_shape(tmp_path)
    file.write_text(json.dumps(LLAMA))
    assert read_shape(tmp_path) == msgspec.structs.replace(read_shape(file), name=str(tmp_path))
    file.write_text('{\n"hidden_size": ,\n}')
    with pytest.raises(InvalidConfigError, match=r"config\.json:2: not JSON"):
        read_shape(tmp_path)
    file.write_text("[1]")
    with pytest.raises(InvalidConfigError, match="must hold an object"):
        read_shape(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfigError, match="cannot be read"):
        read_shape(file)


def test_another_precision_changes_weights_and_kv() -> None:
    assert TINY.with_dtype("auto") == TINY
    assert TINY.with_dtype("float32").kv_dtype == "float32"
    half = TINY.with_dtype("fp8")
    assert (half.weight_dtype, half.kv_dtype, half.weight_bytes) == ("fp8", "bfloat16", TINY.num_params)
    num_scales = TINY.num_layers * TINY.num_kv_heads * 2  # float32, of keys and of values
    assert TINY.with_dtype("auto", "fp8").kv_bytes_per_token() == TINY.kv_bytes_per_token() // 2 + 4 * num_scales
    with pytest.raises(InvalidConfigError, match="dtype is 'float7'"):
        TINY.with_dtype("float7")
    with pytest.raises(InvalidConfigError, match="kv_dtype is 'float7'"):
        TINY.with_dtype("auto", "float7")


def test_a_shape_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers=0"):
        ModelShape(**{**msgspec.structs.asdict(TINY), "num_layers": 0})
