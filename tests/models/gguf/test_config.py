"""Metadata as a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tiny_gguf import F32, U32, Raw, convert_checkpoint, encoded, gguf_bytes
from tiny_models import save_tiny_model

from octavo.models.checkpoint import SHIPPED
from octavo.models.errors import ModelLoadError, UnsupportedModelError, WeightsError
from octavo.models.gguf.config import read_config
from octavo.models.gguf.reader import GGUFFile
from octavo.models.plain_config import PlainConfig, read_plain_config
from octavo.models.registry import load_config
from octavo.models.rotary import rotary_frequencies

LEAF = SHIPPED / "leaf-4m"


def config_of(path: Path) -> Any:
    with GGUFFile(path) as file:
        return read_config(file)


def converted(tmp_path: Path, model_type: str, *, kind: str = "F32", **fields: Any) -> Path:
    """A tiny model as a GGUF file; `extra` and `extra_tensors` go there, other fields into its configuration."""
    extra, tensors = fields.pop("extra", None), fields.pop("extra_tensors", None)
    save_tiny_model(model_type, tmp_path, **fields)
    return convert_checkpoint(
        tmp_path, tmp_path / "m.gguf", kind=kind, tokenizer={}, extra=extra, extra_tensors=tensors
    )


def test_the_shipped_model_has_the_configuration_of_its_config_json(tmp_path: Path) -> None:
    path = convert_checkpoint(LEAF, tmp_path / "leaf.gguf", kind="BF16")
    assert config_of(path) == read_plain_config(LEAF)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_configuration_is_that_of_the_checkpoint(model_type: str, tied: bool, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    fields = {"tie_word_embeddings": tied, "rope_parameters": rope, "rms_norm_eps": 1e-5}
    config = config_of(converted(tmp_path, model_type, **fields))
    theirs = load_config(tmp_path)
    assert isinstance(config, PlainConfig)
    for name in PlainConfig.__struct_fields__:
        if name not in ("dtype", "layer_types", "attention_bias", "mlp_bias", "sliding_window"):
            assert getattr(config, name) == getattr(theirs, name), name


def test_biases_are_found_by_their_tensors(tmp_path: Path) -> None:
    config = config_of(converted(tmp_path, "llama", attention_bias=True, mlp_bias=True))
    assert (config.attention_bias, config.mlp_bias) == (True, True)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]
)
def test_the_dtype_is_that_of_the_matrices_and_bfloat16_where_they_are_quantised(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    assert config_of(converted(tmp_path, "qwen3", kind=kind)).dtype == dtype


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_gemma_s_pattern_of_layers_and_caps_are_those_of_the_checkpoint(model_type: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"num_hidden_layers": 7, "layer_types": None}
    if model_type == "gemma3_text":
        fields["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    architecture = model_type.removesuffix("_text")
    extra = {
        f"{architecture}.attention.sliding_window": U32(8),
        **(
            {"gemma2.attn_logit_softcapping": F32(50.0), "gemma2.final_logit_softcapping": F32(30.0)}
            if architecture == "gemma2"
            else {
                "gemma3.rope.freq_base": F32(1e6),
                "gemma3.rope.scaling.type": "linear",
                "gemma3.rope.scaling.factor": F32(8.0),
            }
        ),
    }
    config = config_of(converted(tmp_path, model_type, extra=extra, **fields))
    theirs = load_config(tmp_path)
    for name in (
        *("layer_types", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "rope_parameters"),
        *("final_logit_softcapping", "hidden_activation", "head_dim", "rms_norm_eps", "use_bidirectional_attention"),
    ):
        assert getattr(config, name) == getattr(theirs, name), name


LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (LINEAR, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": F32(3.0)}),
    "linear, older": (LINEAR, {"llama.rope.scale_linear": F32(3.0)}),
    "none": ({"rope_type": "default", "rope_theta": 10000.0}, {"llama.rope.scaling.type": "none"}),
    "yarn": (
        YARN,
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": F32(4.0),
            "llama.rope.scaling.original_context_length": U32(128),
        },
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_a_scaling_turns_by_the_checkpoint_s_angles(case: str, tmp_path: Path) -> None:
    rope, extra = SCALINGS[case]
    ours = rotary_frequencies(config_of(converted(tmp_path, "llama", rope_parameters=rope, extra=extra)), 16, 512)
    theirs = rotary_frequencies(load_config(tmp_path), 16, 512)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]


def test_llama_3_s_scaling_is_stored_as_factors_and_gives_its_angles(tmp_path: Path) -> None:
    rope = {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    }
    save_tiny_model("llama", tmp_path, rope_parameters=rope)
    scaled, _ = rotary_frequencies(load_config(tmp_path), 16, 512)
    plain = 1.0 / 500000.0 ** (np.arange(0, 16, 2, dtype=np.float64) / 16)
    factors = {"rope_freqs.weight": encoded(plain / scaled.double().numpy(), "F32")}
    path = convert_checkpoint(tmp_path, tmp_path / "m.gguf", tokenizer={}, extra_tensors=factors)
    config = config_of(path)
    assert isinstance(config, PlainConfig)
    ours, attention = rotary_frequencies(config, 16, 512)
    assert attention == 1.0
    torch.testing.assert_close(ours, scaled, rtol=3e-7, atol=0)
    assert ours[-1] < 0.2 * plain[-1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "mamba"}, "architecture 'mamba'.*llama, qwen2, qwen3, gemma2, gemma3"),
    "no architecture": ({"general.architecture": 5}, "architecture '5'"),
    "experts": ({"llama.expert_count": U32(8)}, "expert_count is 8.*mixture"),
    "part of a head turns": ({"llama.rope.dimension_count": U32(8)}, "dimension_count is 8.*whole heads"),
    "value width": ({"llama.attention.value_length": U32(8)}, "value_length is 8"),
    "heads by layer": ({"llama.attention.head_count": [4, 2]}, "differs from layer to layer"),
    "scaling": ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    "yarn of another kind": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": F32(2.0)},
        "attn_factor is 2.0",
    ),
    "window": ({"llama.attention.sliding_window": U32(8)}, "sliding windows"),
    "no heads": ({"llama.attention.head_count": U32(0)}, "head_count is 0; a number above 0"),
    "heads as text": ({"llama.attention.head_count": "4"}, "a number above 0 is needed"),
    "other width": ({"llama.embedding_length": U32(65)}, r"embedding_length is 65; but token_embd.weight has .*64"),
    "other MLP": ({"llama.feed_forward_length": U32(2**31)}, r"ffn_up.weight has the shape \[128, 64\]"),
    "other heads": ({"llama.attention.key_length": U32(2**20)}, "value_length is 16|attn_q.weight has the shape"),
    "too many layers": ({"llama.block_count": U32(2**32 - 1)}, "no tensor blk.2.attn_norm.weight"),
    "context": ({"llama.context_length": U32(2**31)}, "context_length is 2147483648; at most 16777216"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": F32(0.0)}, "epsilon is 0.0; a number above 0"),
    "base": ({"llama.rope.freq_base": F32(float("inf"))}, "freq_base is inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_by_its_key(case: str, tmp_path: Path) -> None:
    extra, message = REFUSED[case]
    path = converted(tmp_path, "llama", extra=extra)
    with pytest.raises(ModelLoadError, match=message):
        config_of(path)


def test_a_list_of_the_same_number_for_each_layer_is_that_number(tmp_path: Path) -> None:
    config = config_of(converted(tmp_path, "llama", extra={"llama.attention.head_count_kv": [2, 2]}))
    assert config.num_key_value_heads == 2


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(
        gguf_bytes({"general.architecture": "qwen3"}, {"token_embd.weight": encoded(np.ones((4, 32)), "F32")})
    )
    with pytest.raises(WeightsError, match=r"qwen3\.embedding_length is None"):
        config_of(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("factors", "error"),
    [
        (encoded(np.ones(7), "F32"), UnsupportedModelError),
        (encoded(np.zeros(8), "F32"), WeightsError),
        (Raw("F16", (8,), bytes(16)), UnsupportedModelError),
    ],
)
def test_rope_factors_that_do_not_fit_are_refused(factors: Raw, error: type[Exception], tmp_path: Path) -> None:
    path = converted(tmp_path, "llama", extra_tensors={"rope_freqs.weight": factors})
    with pytest.raises(error, match=r"rope_freqs\.weight"):
        config_of(path)


def test_a_plain_configuration_stays_plain(tmp_path: Path) -> None:
    config = config_of(converted(tmp_path, "qwen2"))
    assert msgspec.structs.asdict(config)["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
