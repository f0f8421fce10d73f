"""A native model's layers in one call, beside the same layers one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from c_library import needs_c
from paged_runner import PagedRunner
from tiny_models import random_token_ids, save_tiny_model

from octavo.kernels import decoder_stack
from octavo.models.decoder import Decoder
from octavo.models.registry import load_model

pytestmark = needs_c

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
    "smollm3, where some layers do not turn": ("smollm3", {}),
    "gemma2 with soft caps": ("gemma2", {"attn_logit_softcapping": 0.5}),
    "gemma3": ("gemma3_text", {}),
}
STEPS = ({0: random_token_ids(21, seed=1)}, {1: random_token_ids(7, seed=2), 0: [5]}, {0: [6], 1: [9]}, {1: [3]})


def logits_of(model: Any) -> list[torch.Tensor]:
    """Of a prompt alone, a step with a prompt and a decode, two decodes, and one."""
    runner = PagedRunner(model, num_rows=2, max_len=32, block_size=4)
    return [logits for step in STEPS for logits in runner.step(step).values()]


def check_both_ways(folder: Path, **options: Any) -> None:
    model: Any = load_model(folder, **options)
    assert model.stack is not None, "otherwise nothing is compared"
    in_one_call = logits_of(model)
    model.stack = None
    one_by_one = logits_of(model)
    assert all(torch.equal(a, b) for a, b in zip(in_one_call, one_by_one, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_one_call_gives_the_bits_of_layer_by_layer(case: str, dtype: str, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    save_tiny_model(model_type, tmp_path, seed=5, **overrides)
    model: Any = load_model(tmp_path, dtype=dtype)
    if not model.linear.is_in_c(100):
        pytest.skip("this processor multiplies many rows by torch")
    check_both_ways(tmp_path, dtype=dtype)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_so_it_does_for_quantised_weights(quantization: str, deterministic: bool, tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path, seed=6)
    check_both_ways(tmp_path, dtype="float32", quantization=quantization, deterministic=deterministic)


def test_a_mixture_of_experts_goes_layer_by_layer(tmp_path: Path) -> None:
    save_tiny_model("qwen3_moe", tmp_path)
    model: Any = load_model(tmp_path, dtype="float32")
    assert model.stack is None
    logits_of(model)


def test_without_the_c_library_there_is_no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model("llama", tmp_path)
    monkeypatch.setattr(decoder_stack, "_kernels", lambda: None)
    model: Any = load_model(tmp_path, dtype="float32")
    assert isinstance(model, Decoder)
    assert model.stack is None
    logits_of(model)


def test_layers_that_multiply_otherwise_are_no_stack(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    model: Any = load_model(tmp_path, dtype="float32")
    model.layers[1].mlp.linear = torch.nn.functional.linear
    assert model.stack is None


def test_a_cache_that_was_given_back_is_not_written_to(tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path)
    model: Any = load_model(tmp_path, dtype="float32")
    first = logits_of(model)
    second = logits_of(model)  # with caches of its own
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
