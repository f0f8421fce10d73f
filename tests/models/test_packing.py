"""Models on a processor with instructions for bfloat16, which is made believe here: in float32 oneDNN packs for every
x86 processor, and in bfloat16 a stand-in does."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from c_library import needs_c
from packed_in_torch import PanelsInTorch
from paged_runner import PagedRunner, assert_greedy_tokens_agree, greedy_paged, run_paged
from tiny_models import greedy_reference, random_token_ids, reference_logits, save_tiny_model

from octavo.kernels import linear_packed
from octavo.kernels.linear_packed import FEW_ROWS, PackedWeight, Packer
from octavo.models import layers as layers_module
from octavo.models.layers import Linear
from octavo.models.mixture import MixtureOfExperts
from octavo.models.registry import load_model

pytestmark = needs_c

PROMPT = random_token_ids(40, seed=1)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {}),
    "mixtral": ("mixtral", {}),
    "gpt-oss": ("gpt_oss", {}),
}


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_packed, "_LEAST_BYTES", 0)


@pytest.fixture
def fast_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a processor with AMX would be found to be."""
    monkeypatch.setattr(layers_module, "cpu_multiplies_in", lambda dtype: True)
    monkeypatch.setattr(layers_module, "_has_tiles", lambda: True)


def matrices(model: Any) -> list[Any]:
    found = []
    for layer in model.layers:
        mlp = layer.mlp
        parts = mlp.experts.values() if isinstance(mlp, MixtureOfExperts) else [mlp]
        found += [layer.attention.qkv, layer.attention.o]
        found += [matrix for part in parts for matrix in (part.gate_up, part.down)]
    return found


def pack_in_float32(model: Any) -> None:
    """As a model is packed that has just been loaded; by oneDNN."""
    linear = Linear(F.linear, quick=True, few_rows=4, packs=True)
    model.linear = linear
    for layer in model.layers:
        layer.attention.linear = linear
        layer.mlp.use(linear, {})
    model.pack()
    if not any(isinstance(matrix, PackedWeight) for matrix in matrices(model)):
        pytest.skip("oneDNN packs otherwise on this processor")


@pytest.mark.parametrize("case", CASES)
def test_packed_models_give_the_tokens_of_transformers(case: str, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    reference = save_tiny_model(model_type, tmp_path, seed=2, **overrides)
    model: Any = load_model(tmp_path, dtype="float32")
    pack_in_float32(model)
    assert all(isinstance(matrix, PackedWeight) for matrix in matrices(model))
    tokens = greedy_paged(model, PROMPT, 12, chunks=[3, 30, 7])  # few rows, and many
    expected = reference_logits(reference, PROMPT + tokens)
    assert_greedy_tokens_agree(expected, PROMPT + tokens, len(PROMPT))
    if tokens != greedy_reference(reference, PROMPT, 12):  # only where two logits tie
        best = expected[len(PROMPT) - 1 : -1].topk(2).values
        assert float((best[:, 0] - best[:, 1]).min()) < 2e-3


def test_steps_of_few_rows_are_one_call_with_the_bits_of_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("qwen3", tmp_path, seed=3)
    model: Any = load_model(tmp_path, dtype="float32")
    pack_in_float32(model)
    rows = watched_stack(model, monkeypatch)
    steps: list[dict[int, list[int]]] = [{0: PROMPT[:4]}, {0: PROMPT[4:16]}, {0: [5], 1: PROMPT[:3]}, {1: [9]}]

    def logits() -> list[torch.Tensor]:
        runner = PagedRunner(model, num_rows=2, max_len=32, block_size=4)
        return [row for step in steps for row in runner.step(step).values()]

    in_one_call = logits()
    assert rows == [4, 4, 1]
    model.stack = None
    assert all(torch.equal(a, b) for a, b in zip(in_one_call, logits(), strict=True))


def watched_stack(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that the stack takes from now on."""
    assert model.stack is not None
    rows: list[int] = []
    run = model.stack.run
    monkeypatch.setattr(model.stack, "run", lambda x, *others: rows.append(len(x)) or run(x, *others))
    return rows


@pytest.mark.usefixtures("fast_in_bfloat16")
def test_bfloat16_is_packed_at_load_held_once_and_near_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("qwen3", tmp_path, seed=4)
    plain: Any = load_model(tmp_path, dtype="bfloat16")  # oneDNN refuses, or does as the stand-in
    library = PanelsInTorch()
    monkeypatch.setattr(linear_packed, "OneDNN", lambda: library)
    monkeypatch.setattr(Packer, "pack", watched_pack(originals := []))
    model: Any = load_model(tmp_path, dtype="bfloat16")
    gc.collect()
    assert len(originals) == 8
    assert not any(original() is not None for original in originals), "the plain matrices take memory yet"
    assert all(isinstance(matrix, PackedWeight) for matrix in matrices(model))
    assert isinstance(model.vocabulary.head, torch.Tensor)
    before = library.num_products
    ours, theirs = run_paged(model, PROMPT, [30]), run_paged(plain, PROMPT, [30])
    assert library.num_products == before + 8  # of 30 rows at once; all others went one by one
    assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def watched_pack(originals: list[Any]) -> Any:
    pack = Packer.pack

    def watched(self: Packer, weight: torch.Tensor) -> PackedWeight | None:
        originals.append(weakref.ref(weight))
        return pack(self, weight)

    return watched


@pytest.mark.usefixtures("fast_in_bfloat16")
def test_where_packing_is_refused_the_model_is_served_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model("llama", tmp_path, seed=5)
    monkeypatch.setattr(linear_packed, "OneDNN", lambda: PanelsInTorch(refuses=RuntimeError("not on this one")))
    with caplog.at_level(logging.WARNING):
        model: Any = load_model(tmp_path, dtype="bfloat16")
    assert any("linear_packed.off" in line and "not on this one" in line for line in caplog.messages)
    assert all(isinstance(matrix, torch.Tensor) for matrix in matrices(model))
    assert run_paged(model, PROMPT, [30]).isfinite().all()


@pytest.mark.usefixtures("fast_in_bfloat16")
@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_deterministic_arithmetic_packs_and_widens_nothing_and_keeps_its_promise(
    quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("qwen3", tmp_path, seed=6)
    monkeypatch.setattr(linear_packed, "OneDNN", PanelsInTorch)
    monkeypatch.setattr(layers_module, "linear_widened", None)
    model: Any = load_model(tmp_path, dtype="bfloat16", deterministic=True, quantization=quantization)
    assert not any(isinstance(matrix, PackedWeight) for matrix in matrices(model))
    alone = run_paged(model, PROMPT)
    assert torch.equal(run_paged(model, PROMPT, [1, 35, 2, 2]), alone)
    runner = PagedRunner(model, num_rows=2)
    assert torch.equal(runner.step({0: random_token_ids(50, seed=7), 1: PROMPT})[1], alone)


@pytest.mark.usefixtures("fast_in_bfloat16")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_are_widened_for_many_rows_and_stay_one_call_for_fewer(
    quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("qwen3", tmp_path, seed=8)
    model: Any = load_model(tmp_path, dtype="bfloat16", quantization=quantization)
    assert not any(isinstance(matrix, PackedWeight) for matrix in matrices(model))
    rows = watched_stack(model, monkeypatch)
    widened: list[int] = []
    widen = layers_module.linear_widened

    def watched(x: torch.Tensor, weight: Any, multiply: Any) -> torch.Tensor:
        widened.append(len(x))
        return widen(x, weight, multiply)

    monkeypatch.setattr(layers_module, "linear_widened", watched)
    ours = run_paged(model, PROMPT, [32, 8])
    assert rows == [8]
    assert widened == [32] * 9  # four in each of two layers, and the head
    never = Linear(model.linear.dense, quick=True, few_rows=4)
    model.linear = never
    for layer in model.layers:
        layer.attention.linear = layer.mlp.linear = never
    theirs = run_paged(model, PROMPT, [32, 8])
    assert rows == [8, 32, 8]
    assert not torch.equal(ours, theirs)
    # Codes of 4 bits are otherwise multiplied by inputs of 8.
    assert (ours - theirs).norm() <= (0.03 if quantization == "int8" else 0.1) * theirs.norm()


def test_a_packed_weight_is_not_multiplied_by_other_arithmetic(tmp_path: Path) -> None:
    weight = Packer(PanelsInTorch()).pack(torch.randn(64, 64).bfloat16())
    assert weight is not None
    with pytest.raises(AssertionError, match="packed for another way"):
        Linear(F.linear)(torch.zeros(FEW_ROWS, 64).bfloat16(), weight)
