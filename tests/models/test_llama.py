"""Llama-like families against `transformers`, in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_runner import PagedRunner, assert_greedy_tokens_agree, greedy_paged, run_paged
from tiny_models import random_token_ids, reference_logits, save_tiny_model

from octavo.models.errors import UnsupportedModelError
from octavo.models.llama import LlamaForCausalLM
from octavo.models.registry import DTYPES, load_model

NUM_PROMPT, NUM_DECODES = 40, 16

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-as-many-kv-heads": ("llama", {"num_key_value_heads": 4, "head_dim": 24}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN, "max_position_embeddings": 128}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}},
    ),
    "llama-proportional": (
        "llama",
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "mistral-window-of-one": ("mistral", {"sliding_window": 1}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "mixtral-window": ("mixtral", {"sliding_window": 8, "num_experts_per_tok": 3, "num_local_experts": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-max-window-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 32}),
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-normalised": ("qwen3_moe", {"norm_topk_prob": True, "attention_bias": True}),
    "qwen3-moe-dense-layers": ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2}),
    "qwen3-moe-one-expert": ("qwen3_moe", {"num_experts_per_tok": 1, "use_sliding_window": True, "sliding_window": 8}),
    "smollm3": ("smollm3", {}),
    "smollm3-tied": ("smollm3", {"tie_word_embeddings": True}),
    "smollm3-window": ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_stepping_equals_transformers(case: str, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    reference = save_tiny_model(model_type, tmp_path, seed=2, **overrides)
    model = load_model(tmp_path, dtype="float32", model_impl="native")
    assert isinstance(model, LlamaForCausalLM)
    prompt = random_token_ids(NUM_PROMPT, seed=2)
    tokens = prompt + greedy_paged(model, prompt, NUM_DECODES, chunks=(7, 16, 17), block_size=5)
    expected = reference_logits(reference, tokens)
    assert_greedy_tokens_agree(expected, tokens, NUM_PROMPT)
    assert len(set(tokens[NUM_PROMPT:])) > 3, "a model that repeats one token proves nothing"
    for chunks, block_size in ((None, 16), ((7, 16, 17), 5), ((NUM_PROMPT,), 1)):
        torch.testing.assert_close(run_paged(model, tokens, chunks, block_size), expected, atol=1e-4, rtol=1e-4)


def test_rows_batched_together_get_the_logits_they_get_alone(tmp_path: Path) -> None:
    reference = save_tiny_model("qwen3", tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    model = load_model(tmp_path, dtype="float32", model_impl="native")
    runner = PagedRunner(model, num_rows=3, max_len=64, block_size=4)
    rows = [random_token_ids(length, seed=length) for length in (30, 21, 12)]
    runner.step({0: rows[0][:29], 1: rows[1][:20]})
    mixed = runner.step({2: rows[2], 0: rows[0][29:], 1: rows[1][20:]})  # two decodes beside a prefill
    for row, token_ids in enumerate(rows):
        expected = reference_logits(reference, token_ids)[-len(mixed[row]) :]
        torch.testing.assert_close(mixed[row], expected, atol=1e-4, rtol=1e-4)


def test_a_position_past_the_prepared_ones_is_an_error_and_not_a_wrong_angle(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    model = load_model(tmp_path, dtype="float32", model_impl="native", max_model_len=16)
    run_paged(model, random_token_ids(16))
    with pytest.raises(IndexError):
        run_paged(model, random_token_ids(17))


@pytest.mark.parametrize("served", [32, 40])
def test_longrope_equals_transformers_at_the_served_length(served: int, tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    }
    reference = save_tiny_model("llama", tmp_path, rope_parameters=rope, max_position_embeddings=128)
    model = load_model(tmp_path, dtype="float32", model_impl="native", max_model_len=served)
    token_ids = random_token_ids(served)
    expected = reference_logits(reference, token_ids)
    torch.testing.assert_close(run_paged(model, token_ids, chunks=(9, 14)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "qwen3_moe", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_to_float32_as_transformers_is(model_type: str, dtype: str, tmp_path: Path) -> None:
    exact_model = save_tiny_model(model_type, tmp_path, seed=5)
    token_ids = random_token_ids(NUM_PROMPT, seed=6)
    exact = reference_logits(exact_model, token_ids)
    model = load_model(tmp_path, dtype=dtype, model_impl="native")
    assert model.dtype == DTYPES[dtype]
    ours = run_paged(model, token_ids, chunks=(17, 23))
    theirs = reference_logits(exact_model.to(DTYPES[dtype]), token_ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).pow(2).mean().sqrt() <= 1.5 * (theirs - exact).pow(2).mean().sqrt()


def test_tied_weights_that_differ_in_the_checkpoint_are_both_kept(tmp_path: Path) -> None:
    reference = save_tiny_model("llama", tmp_path, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = load_model(tmp_path, dtype="float32", model_impl="native")
    token_ids = random_token_ids(10)
    torch.testing.assert_close(
        run_paged(model, token_ids), reference_logits(reference, token_ids), atol=1e-4, rtol=1e-4
    )


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
    "partial rotary": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "heads": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 attention heads cannot share 3 KV heads"),
    "layer type": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 2},
        "layer type chunked_attention is not supported",
    ),
    "window": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"] * 2},
        "sliding_window is not set",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_an_option_that_is_not_implemented_is_named_at_load(case: str, tmp_path: Path) -> None:
    overrides, message = UNSUPPORTED[case]
    save_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **overrides}))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path, dtype="float32", model_impl="native")
