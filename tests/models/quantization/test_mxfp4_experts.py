"""GPT-OSS's experts in MXFP4 as a GPU keeps them: the checkpoint's codes, or where those cannot be had floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mxfp4_checkpoints import save_mxfp4_model
from paged_runner import run_paged
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids, save_tiny_model
from unconnected_ranks import floats, member

from octavo.kernels.expert_codes import MOST_EXPONENT
from octavo.kernels.expert_stack import CodedExpertStack, ExpertStack
from octavo.models.errors import WeightsError
from octavo.models.quantization.mxfp4 import MXFP4Reader, RandomMXFP4Reader
from octavo.models.registry import load_model

SHARED = "model.layers.1.mlp.experts.{}"


@pytest.fixture
def codes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(MXFP4Reader, "keeps_codes", True)


def load(folder: Path, **fields: Any) -> Any:
    group = member(**fields) if fields else None
    return load_model(folder, dtype="float32", model_impl="native", group=group)


def stack_of(model: Any, layer: int = 1) -> CodedExpertStack:
    stack = model.layers[layer].mlp._stack
    assert isinstance(stack, CodedExpertStack)
    return stack


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace one tensor of a checkpoint; None takes it away."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(
        tensors if tensor is None else {**tensors, name: tensor},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def test_codes_say_what_the_floats_say_that_they_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mxfp4_model(tmp_path, seed=4)
    floating = load(tmp_path)
    monkeypatch.setattr(MXFP4Reader, "keeps_codes", True)
    kept = load(tmp_path)
    for index, expert in floating.layers[1].mlp.experts.items():
        w13, w2 = stack_of(kept).matrices(index, torch.float32)
        assert torch.equal(w13, floats(expert.gate_up)) and torch.equal(w2, floats(expert.down))
    tokens = random_token_ids(33, seed=3)
    torch.testing.assert_close(run_paged(kept, tokens), run_paged(floating, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("codes_are_kept")
def test_an_expert_takes_four_and_a_quarter_bits_a_weight(tmp_path: Path) -> None:
    save_mxfp4_model(tmp_path, hidden_size=128)
    stack = stack_of(load(tmp_path))
    num_weights = 4 * 3 * 128 * 128
    assert stack.w13.num_bytes + stack.w2.num_bytes == num_weights * 4.25 / 8


@pytest.mark.usefixtures("codes_are_kept")
def test_ranks_have_the_codes_of_their_part(tmp_path: Path) -> None:
    save_mxfp4_model(tmp_path)
    whole = stack_of(load(tmp_path))
    ranks = [stack_of(load(tmp_path, rank=rank, tp=4)) for rank in range(4)]
    assert [rank.b2 is not None for rank in ranks] == [True, False, False, False]
    for expert in range(4):
        w13, w2 = whole.matrices(expert, torch.float32)
        parts = [rank.matrices(expert, torch.float32) for rank in ranks]
        for half, of_whole in enumerate(w13.chunk(2)):
            assert torch.equal(torch.cat([part[0].chunk(2)[half] for part in parts]), of_whole)
        assert torch.equal(torch.cat([part[1] for part in parts], 1), w2)
    assert whole.b13 is not None
    for half, biases in enumerate(whole.b13.chunk(2, dim=1)):
        assert torch.equal(torch.cat([rank.b13.chunk(2, dim=1)[half] for rank in ranks], 1), biases)
    by_expert = [stack_of(load(tmp_path, rank=rank, tp=2, expert_parallel=True)) for rank in range(2)]
    assert [stack.first for stack in by_expert] == [0, 2]
    assert torch.equal(torch.cat([stack.w13.codes for stack in by_expert]), whole.w13.codes)
    assert torch.equal(torch.cat([stack.b2 for stack in by_expert]), whole.b2)


@pytest.mark.usefixtures("codes_are_kept")
def test_a_part_that_tears_groups_apart_is_floating(tmp_path: Path) -> None:
    save_mxfp4_model(tmp_path, intermediate_size=96)
    mixture = load(tmp_path, rank=1, tp=2).layers[1].mlp
    assert list(mixture.experts) == [0, 1, 2, 3] and mixture.experts[0].down.shape == (64, 48)
    mixture.stack_experts()
    assert isinstance(mixture._stack, ExpertStack)


@pytest.mark.usefixtures("codes_are_kept")
def test_experts_of_exponents_that_products_do_not_know_are_floating(tmp_path: Path) -> None:
    save_mxfp4_model(tmp_path)
    name = SHARED.format("down_proj_scales")
    scales = load_file(tmp_path / "model.safetensors")[name]
    for exponent, stays in ((MOST_EXPONENT, True), (MOST_EXPONENT + 1, False)):
        scales[2, 0, 0] = exponent
        change(tmp_path, name, scales)
        mixture = load(tmp_path).layers[1].mlp
        assert isinstance(mixture._stack, CodedExpertStack) == stays
        assert bool(mixture.experts) != stays


@pytest.mark.usefixtures("codes_are_kept")
@pytest.mark.parametrize(
    "suffix", ["down_proj_scales", "down_proj_blocks", "gate_up_proj_scales", "gate_up_proj_blocks"]
)
def test_a_checkpoint_that_is_not_whole_is_refused(suffix: str, tmp_path: Path) -> None:
    save_mxfp4_model(tmp_path)
    name = SHARED.format(suffix)
    stored = load_file(tmp_path / "model.safetensors")[name]
    change(tmp_path, name, stored[..., 1:].contiguous())
    with pytest.raises(WeightsError, match=rf"1 have another shape: {name} torch\.uint8"):
        load(tmp_path)
    change(tmp_path, name, None)
    with pytest.raises(WeightsError, match=f"1 tensors are missing: {name}"):
        load(tmp_path)


@pytest.mark.usefixtures("codes_are_kept")
def test_experts_that_were_left_floating_in_the_checkpoint_are_so(tmp_path: Path) -> None:
    save_tiny_model("gpt_oss", tmp_path)
    assert load(tmp_path).layers[1].mlp.experts


@pytest.mark.usefixtures("codes_are_kept")
def test_random_weights_are_kept_as_the_checkpoint_s_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mxfp4_model(tmp_path)
    stored = stack_of(load(tmp_path))
    (tmp_path / "model.safetensors").unlink()

    def load_random(**fields: Any) -> Any:
        group = member(**fields) if fields else None
        return load_model(tmp_path, dtype="float32", load_format="dummy", group=group)

    assert load_random().layers[1].mlp.experts, "a CPU has no products with codes"
    monkeypatch.setattr(RandomMXFP4Reader, "keeps_codes", True)
    whole = stack_of(load_random())
    assert whole.w13.codes.shape == stored.w13.codes.shape and whole.w2.scales.dtype is stored.w2.scales.dtype
    assert whole.w13.dequantize(1).std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(whole.w13.codes[0], whole.w13.codes[1])
    parts = [stack_of(load_random(rank=rank, tp=2)).w2.dequantize(3) for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1), whole.w2.dequantize(3))
