"""GPT-OSS against `transformers`, in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mxfp4_checkpoints import save_mxfp4_model
from paged_runner import PagedRunner, assert_greedy_tokens_agree, greedy_paged, run_paged
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids, reference_logits, save_tiny_model
from transformers import AutoModelForCausalLM
from unconnected_ranks import floats, member

from octavo.models.errors import UnsupportedModelError, WeightsError
from octavo.models.gpt_oss import GptOssForCausalLM
from octavo.models.registry import DTYPES, load_model

NUM_PROMPT, NUM_DECODES = 40, 16

# As in the published configurations, but for the length of pre-training, which prompts here must pass.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
    "rope_theta": 150000.0,
}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_parameters": _YARN},
    "yarn-four-layers-tied": {"rope_parameters": _YARN, "num_hidden_layers": 4, "tie_word_embeddings": True},
    "no-attention-bias": {"attention_bias": False},
    "one-kv-head-wide": {"num_key_value_heads": 1, "head_dim": 24},
    "all-layers-full": {"layer_types": ["full_attention", "full_attention"]},
    "window-of-one": {"sliding_window": 1},
    "three-of-five-experts": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "one-expert-of-all": {"num_experts_per_tok": 1},
    "all-experts": {"num_experts_per_tok": 4},
    "tight-clamp": {"swiglu_limit": 0.5, "swiglu_alpha": 1.1},
}


def assert_every_way_of_stepping_agrees(reference: Any, folder: Path, quantization: Any = "auto") -> None:
    model = load_model(folder, dtype="float32", model_impl="native", quantization=quantization)
    assert isinstance(model, GptOssForCausalLM)
    prompt = random_token_ids(NUM_PROMPT, seed=2)
    tokens = prompt + greedy_paged(model, prompt, NUM_DECODES, chunks=(7, 16, 17), block_size=5)
    expected = reference_logits(reference, tokens)
    assert_greedy_tokens_agree(expected, tokens, NUM_PROMPT)
    assert len(set(tokens[NUM_PROMPT:])) > 3, "a model that repeats one token proves nothing"
    for chunks, block_size in ((None, 16), ((7, 16, 17), 5), ((NUM_PROMPT,), 1)):
        torch.testing.assert_close(run_paged(model, tokens, chunks, block_size), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_stepping_equals_transformers(case: str, tmp_path: Path) -> None:
    assert_every_way_of_stepping_agrees(save_tiny_model("gpt_oss", tmp_path, seed=2, **CASES[case]), tmp_path)


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    assert_every_way_of_stepping_agrees(save_mxfp4_model(tmp_path, seed=2, rope_parameters=_YARN), tmp_path)


def test_experts_stored_in_bfloat16_are_multiplied_as_they_are(tmp_path: Path) -> None:
    save_tiny_model("gpt_oss", tmp_path, seed=2).bfloat16().save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert_every_way_of_stepping_agrees(reference.eval(), tmp_path)


def test_sinks_windows_and_biases_matter_to_the_reference(tmp_path: Path) -> None:
    """Otherwise agreement above would not prove that they are read."""
    reference = save_tiny_model("gpt_oss", tmp_path, seed=2)
    token_ids = random_token_ids(NUM_PROMPT, seed=2)
    exact = reference_logits(reference, token_ids)
    for suffix in ("sinks", "router.bias", "gate_up_proj_bias", "down_proj_bias", "q_proj.bias", "o_proj.bias"):
        kept = {name: tensor.clone() for name, tensor in reference.state_dict().items() if name.endswith(suffix)}
        assert kept
        reference.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in kept.items()}, strict=False)
        assert (reference_logits(reference, token_ids) - exact).abs().max() > 1e-2, suffix
        reference.load_state_dict(kept, strict=False)


def test_rows_batched_together_get_the_logits_they_get_alone(tmp_path: Path) -> None:
    reference = save_tiny_model("gpt_oss", tmp_path)
    model = load_model(tmp_path, dtype="float32", model_impl="native")
    runner = PagedRunner(model, num_rows=3, max_len=64, block_size=4)
    rows = [random_token_ids(length, seed=length) for length in (30, 21, 12)]
    runner.step({0: rows[0][:29], 1: rows[1][:20]})
    mixed = runner.step({2: rows[2], 0: rows[0][29:], 1: rows[1][20:]})  # two decodes beside a prefill
    for row, token_ids in enumerate(rows):
        expected = reference_logits(reference, token_ids)[-len(mixed[row]) :]
        torch.testing.assert_close(mixed[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_to_float32_as_transformers_is(dtype: str, tmp_path: Path) -> None:
    exact_model = save_tiny_model("gpt_oss", tmp_path, seed=5)
    token_ids = random_token_ids(NUM_PROMPT, seed=6)
    exact = reference_logits(exact_model, token_ids)
    model = load_model(tmp_path, dtype=dtype, model_impl="native")
    ours = run_paged(model, token_ids, chunks=(17, 23))
    theirs = reference_logits(exact_model.to(DTYPES[dtype]), token_ids)
    assert (ours - exact).pow(2).mean().sqrt() <= 1.5 * (theirs - exact).pow(2).mean().sqrt()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_floating_experts_can_be_quantised_at_load(quantization: Any, tmp_path: Path) -> None:
    reference = save_tiny_model("gpt_oss", tmp_path, seed=5)
    token_ids = random_token_ids(NUM_PROMPT, seed=6)
    exact = reference_logits(reference, token_ids)
    model = load_model(tmp_path, dtype="float32", model_impl="native", quantization=quantization)
    error = (run_paged(model, token_ids) - exact).norm() / exact.norm()
    assert 0 < error < {"int8": 0.1, "int4": 0.6}[quantization]


@pytest.mark.parametrize("kind", ["floating", "mxfp4"])
def test_the_stack_of_all_experts_says_what_they_say_one_by_one(kind: str, tmp_path: Path) -> None:
    if kind == "mxfp4":
        save_mxfp4_model(tmp_path)
    else:
        save_tiny_model("gpt_oss", tmp_path)
    model: Any = load_model(tmp_path, dtype="float32", model_impl="native")
    token_ids = random_token_ids(NUM_PROMPT, seed=6)
    one_by_one = run_paged(model, token_ids)
    for layer in model.layers:
        layer.mlp.stack_experts()
    torch.testing.assert_close(run_paged(model, token_ids), one_by_one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["floating", "mxfp4"])
def test_the_ranks_parts_are_the_whole_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    if kind == "mxfp4":
        save_mxfp4_model(tmp_path)
    else:
        save_tiny_model("gpt_oss", tmp_path)

    def load(**fields: Any) -> Any:
        group = member(**fields) if fields else None
        return load_model(tmp_path, dtype="float32", model_impl="native", group=group)

    whole, ranks = load().layers[1], [load(rank=rank, tp=4).layers[1] for rank in range(4)]
    assert torch.equal(torch.cat([rank.attention.kind.sinks for rank in ranks]), whole.attention.kind.sinks)
    for index, expert in whole.mlp.experts.items():
        parts = [rank.mlp.experts[index] for rank in ranks]
        for half, of_whole in enumerate(floats(expert.gate_up).chunk(2)):
            assert torch.equal(torch.cat([floats(part.gate_up).chunk(2)[half] for part in parts]), of_whole)
        for half, of_whole in enumerate(expert.gate_up_bias.chunk(2)):
            assert torch.equal(torch.cat([part.gate_up_bias.chunk(2)[half] for part in parts]), of_whole)
        assert torch.equal(torch.cat([floats(part.down) for part in parts], 1), floats(expert.down))
        assert [part.down_bias is not None for part in parts] == [True, False, False, False]
    by_expert = [load(rank=rank, tp=2, expert_parallel=True).layers[1].mlp for rank in range(2)]
    assert [list(mlp.experts) for mlp in by_expert] == [[0, 1], [2, 3]]
    for mlp in by_expert:
        for index, expert in mlp.experts.items():
            assert torch.equal(floats(expert.gate_up), floats(whole.mlp.experts[index].gate_up))
            assert torch.equal(expert.down_bias, whole.mlp.experts[index].down_bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lost", r"1 tensors are missing: model\.layers\.1\.mlp\.experts\.down_proj_scales"),
        ("reshaped", r"model\.layers\.1\.mlp\.experts\.down_proj_scales torch\.uint8 \[4, 64, 3\] instead of torch"),
        ("floating", r"model\.layers\.1\.mlp\.experts\.down_proj_scales torch\.float32 \[4, 64, 4\] instead of torch"),
    ],
)
def test_mxfp4_that_is_not_whole_is_refused(change: str, message: str, tmp_path: Path) -> None:
    save_mxfp4_model(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.experts.down_proj_scales"
    scales = tensors.pop(name)
    if change != "lost":
        tensors[name] = scales[..., 1:].contiguous() if change == "reshaped" else scales.float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: there are num_local_experts=4"),
        ({"sliding_window": None}, "sliding_attention but sliding_window is not set"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ],
)
def test_options_that_are_not_implemented_are_refused(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_tiny_model("gpt_oss", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **overrides}))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path, dtype="float32", model_impl="native")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp": 3}, r"4 attention heads, .* intermediate size of 128"),
        ({"tp": 2, "pp": 3}, "the model has 2 layers, so at most 2 stages"),
    ],
)
def test_what_cannot_be_divided_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_tiny_model("gpt_oss", tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path, dtype="float32", group=member(0, **fields))
