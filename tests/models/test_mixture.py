"""Experts one by one, as a CPU has them, and all at once, as a GPU does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paged_runner import run_paged
from tiny_models import random_token_ids, save_tiny_model
from unconnected_ranks import member

from octavo.kernels.expert_stack import CodedExpertStack, ExpertStack
from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.kernels.weight_quantization import quantize
from octavo.models.errors import UnsupportedModelError
from octavo.models.mixture import MixtureOfExperts, stack_on_device
from octavo.models.registry import load_model

TOKENS = random_token_ids(33, seed=3)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-moe with dense layers": ("qwen3_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "qwen3-moe with tanh": ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}),
    "gpt-oss": ("gpt_oss", {}),
}


def load(folder: Path, **options: Any) -> Any:
    return load_model(folder, dtype="float32", model_impl="native", **options)


def mixtures(model: Any) -> list[MixtureOfExperts]:
    return [layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]


@pytest.mark.parametrize("case", CASES)
def test_all_experts_at_once_say_what_they_say_one_by_one(case: str, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    save_tiny_model(model_type, tmp_path, seed=4, **overrides)
    model = load(tmp_path)
    one_by_one = run_paged(model, TOKENS)
    for mixture in mixtures(model):
        mixture.stack_experts()
    torch.testing.assert_close(run_paged(model, TOKENS), one_by_one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("expert_parallel", [True, False])
def test_parts_of_ranks_add_up_to_the_whole_either_way(model_type: str, expert_parallel: bool, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path, seed=4)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = mixtures(load(tmp_path))[0].forward(x)
        for stacked in (False, True):
            total = torch.zeros_like(x)
            for rank in range(2):
                group = member(rank, 2, expert_parallel=expert_parallel)
                mixture = mixtures(load(tmp_path, group=group))[0]
                group.tp_size = 1  # nothing is summed: there is nobody to sum with
                if stacked:
                    mixture.stack_experts()
                total += mixture.forward(x)
            torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-5)


def test_the_stack_is_the_experts_memory_and_not_a_second_copy(tmp_path: Path) -> None:
    save_tiny_model("qwen3_moe", tmp_path)
    model = load(tmp_path)
    stack_on_device([layer.mlp for layer in model.layers], torch.device("cpu"))
    assert all(mixture._stack is None for mixture in mixtures(model)), "on a CPU experts stay by themselves"
    stack_on_device([layer.mlp for layer in model.layers], torch.device("cuda"))
    for mixture in mixtures(model):
        stack = mixture._stack
        assert stack is not None
        for index, expert in mixture.experts.items():
            assert isinstance(expert.gate_up, torch.Tensor) and isinstance(expert.down, torch.Tensor)
            assert expert.gate_up.data_ptr() == stack.w13[index].data_ptr()
            assert expert.down.data_ptr() == stack.w2[index].data_ptr()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_quantised_experts_stay_codes_and_say_the_same(model_type: str, quantization: str, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path, seed=4)
    model = load(tmp_path, quantization=quantization)
    assert not isinstance(mixtures(model)[0].experts[0].down, torch.Tensor)
    one_by_one = run_paged(model, TOKENS)
    stack_on_device([layer.mlp for layer in model.layers], torch.device("cuda"))
    torch.testing.assert_close(run_paged(model, TOKENS), one_by_one, atol=1e-5, rtol=1e-5)
    for mixture in mixtures(model):
        assert isinstance(mixture._stack, CodedExpertStack)
        assert not mixture.experts, "their memory is given back"


def test_parts_of_several_kinds_are_widened_behind_each_other(tmp_path: Path) -> None:
    save_tiny_model("qwen3_moe", tmp_path, seed=4)
    quantized, floating = (mixtures(load(tmp_path, quantization=kind))[0] for kind in ("int8", "auto"))
    expert, other = quantized.experts[0], floating.experts[0]
    assert isinstance(expert.gate_up, QuantizedWeight) and isinstance(other.gate_up, torch.Tensor)
    half = other.gate_up.shape[0] // 2
    expert.gate_up = (other.gate_up[:half], quantize(other.gate_up[half:], bits=8, group_size=32))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = quantized.forward(x)
        quantized.stack_experts()
        torch.testing.assert_close(quantized.forward(x), before, atol=1e-5, rtol=1e-5)
    assert isinstance(quantized._stack, ExpertStack)


def test_what_cannot_be_stacked_is_refused(tmp_path: Path) -> None:
    save_tiny_model("qwen3_moe", tmp_path, hidden_act="relu")
    with pytest.raises(UnsupportedModelError, match="activation is not supported in a mixture of experts on a GPU"):
        mixtures(load(tmp_path))[0].stack_experts()
