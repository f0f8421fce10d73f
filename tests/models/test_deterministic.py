"""A row's logits, bit by bit: alone, batched, chunked, behind a cached prefix, by any number of threads."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from c_library import needs_c
from paged_runner import PagedRunner, run_paged
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids, save_tiny_model
from unconnected_ranks import member

from octavo.kernels import linear_deterministic
from octavo.kernels import mixture as mixture_kernels
from octavo.kernels.linear_rounded import RoundedWeight, round_weight
from octavo.kernels.mixture import mixture_ref
from octavo.kernels.paged_attention import paged_attention
from octavo.models import attention as attention_of_layers
from octavo.models import deterministic as deterministic_module
from octavo.models import layers, weights
from octavo.models.decoder import Decoder
from octavo.models.deterministic import costs_nothing, make_deterministic
from octavo.models.errors import UnsupportedModelError
from octavo.models.gemma import softcap_
from octavo.models.interface import CausalLM
from octavo.models.mixture import MixtureOfExperts
from octavo.models.registry import load_model

pytestmark = needs_c

PROMPT = random_token_ids(41, seed=1)
OTHERS = [random_token_ids(length, seed=length) for length in (9, 70, 23)]

# Families, and what they have that torch would compute in another way in another batch.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with ragged widths": ("llama", {"hidden_size": 60, "intermediate_size": 100, "head_dim": 20}),
    "llama with exact gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 30.0, "vocab_size": 263}),
    "gemma3": ("gemma3_text", {}),
    "gpt-oss": ("gpt_oss", {}),
    "gpt-oss with ragged widths": ("gpt_oss", {"hidden_size": 60, "intermediate_size": 50, "head_dim": 20}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, overrides = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("deterministic")
    save_tiny_model(model_type, folder, seed=3, **overrides)
    return folder


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def deterministic(folder: Path, dtype: str = "float32", **options: Any) -> CausalLM:
    return load_model(folder, dtype=dtype, deterministic=True, **options)


def batched(model: CausalLM, chunk: int) -> torch.Tensor:
    """Logits of PROMPT in the company of others: their whole prompts, then chunks of it beside their decodes."""
    runner = PagedRunner(model, num_rows=4, max_len=128, seed=5)
    runner.step({row + 1: tokens for row, tokens in enumerate(OTHERS)})
    logits = []
    for start in range(0, len(PROMPT), chunk):
        new_tokens = {row + 1: [7 + row] for row in range(len(OTHERS))}
        logits.append(runner.step({0: PROMPT[start : start + chunk], **new_tokens})[0])
    return torch.cat(logits)


def check_every_way(model: CausalLM) -> torch.Tensor:
    """Assert that PROMPT's logits are the same however they are computed; returns them."""
    alone = run_paged(model, PROMPT)
    assert alone.isfinite().all()
    assert torch.equal(run_paged(model, PROMPT, [1] * len(PROMPT)), alone)
    assert torch.equal(run_paged(model, PROMPT, [16, 1, 7, 17], block_size=4), alone)
    for chunk in (1, 5, 41):
        assert torch.equal(batched(model, chunk), alone)
    # A prefix hit: the first 32 tokens' KV was written by another request, in one chunk with other tokens behind it.
    runner = PagedRunner(model, max_len=128)
    runner.step({0: PROMPT[:32] + OTHERS[0]})
    runner._lengths[0] = 32
    assert torch.equal(runner.step({0: PROMPT[32:]})[0], alone[32:])
    return alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_the_same_bits_in_every_company(folder: Path, dtype: str, three_threads: None) -> None:
    model = deterministic(folder, dtype)
    alone = check_every_way(model)
    torch.set_num_threads(1)
    assert torch.equal(run_paged(model, PROMPT), alone)


def test_they_are_the_fast_paths_logits_up_to_rounding(folder: Path) -> None:
    ours = run_paged(deterministic(folder), PROMPT)
    fast = load_model(folder, dtype="float32", deterministic=False)
    torch.testing.assert_close(ours, run_paged(fast, PROMPT), rtol=1e-3, atol=1e-3)


def test_with_torchs_product_of_floats_they_do_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise nothing above would prove anything."""
    monkeypatch.setattr(layers, "linear_dense_quick", F.linear)
    save_tiny_model("llama", tmp_path, seed=3, hidden_size=256, intermediate_size=512)
    model = load_model(tmp_path, dtype="float32", deterministic=False)
    alone = run_paged(model, PROMPT, [1] * len(PROMPT))
    assert any(not torch.equal(other, alone) for other in (run_paged(model, PROMPT), batched(model, 5)))
    check_every_way(deterministic(tmp_path))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_weights_keep_the_promise(quantization: str, dtype: str, tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path, seed=4)
    check_every_way(deterministic(tmp_path, dtype, quantization=quantization))


@pytest.fixture
def whole_numbers() -> None:
    if round_weight(torch.zeros(16, 64, dtype=torch.bfloat16)) is None:
        pytest.skip("this processor multiplies bfloat16 otherwise")


def matrices(model: Any) -> list[Any]:
    return [
        matrix
        for layer in model.layers
        for matrix in (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down)
    ]


@pytest.mark.usefixtures("whole_numbers")
@pytest.mark.parametrize(
    ("overrides", "dtype", "expected"),
    [
        ({}, "bfloat16", [True] * 8),
        ({}, "float32", [False] * 8),
        ({"intermediate_size": 96}, "bfloat16", [True, True, True, False] * 2),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "bfloat16", [True, False, True, True] * 2),
    ],
)
def test_matrices_of_bfloat16_are_rounded_where_groups_of_64_inputs_fill_them(
    overrides: dict[str, Any], dtype: str, expected: list[bool], tmp_path: Path
) -> None:
    save_tiny_model("qwen3", tmp_path, seed=6, **overrides)
    model: Any = deterministic(tmp_path, dtype)
    assert [isinstance(matrix, RoundedWeight) for matrix in matrices(model)] == expected
    assert isinstance(model.vocabulary.embedding, torch.Tensor)
    assert isinstance(model.vocabulary.head, RoundedWeight) == expected[0]
    assert model.stack is not None and model.linear.is_in_c(1, model._kinds) and model.linear.is_in_c(99, model._kinds)
    in_one_call = check_every_way(model)
    model.stack = None
    assert torch.equal(check_every_way(model), in_one_call)


@pytest.mark.usefixtures("whole_numbers")
def test_matrices_are_rounded_as_they_are_read_and_no_other_copy_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path, seed=6)
    placed: list[bool] = []
    place = weights.WeightReader._placed

    def watched(self: Any, parts: list[torch.Tensor], *, is_matrix: bool = False) -> torch.Tensor:
        placed.append(is_matrix)
        return place(self, parts, is_matrix=is_matrix)

    monkeypatch.setattr(weights.WeightReader, "_placed", watched)
    model: Any = load_model(tmp_path, dtype="bfloat16", deterministic=False)
    assert all(isinstance(matrix, RoundedWeight) for matrix in (*matrices(model), model.vocabulary.head))
    assert placed.count(True) == 1, "the embedding"
    stored = load_model(tmp_path, dtype="float32").layers[1].attention.qkv.float()  # type: ignore[attr-defined]
    largest = stored.view(len(stored), -1, 64).abs().amax(dim=-1, keepdim=True).expand(-1, -1, 64).reshape(stored.shape)
    off = (model.layers[1].attention.qkv.dequantize() - stored.bfloat16().float()).abs()
    assert (off <= largest * 2**-12).all()


@pytest.mark.usefixtures("whole_numbers")
def test_where_torch_is_quicker_rounded_matrices_take_the_place_of_those_that_were_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path, seed=6)
    monkeypatch.setattr(layers, "_has_tiles", lambda: True)
    assert not costs_nothing(load_model(tmp_path, dtype="bfloat16", deterministic=False))
    originals: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(weight: torch.Tensor) -> RoundedWeight | None:
        nonlocal most
        gc.collect()
        most = max(most, sum(original() is not None for original in originals))
        originals.append(weakref.ref(weight))
        return round_weight(weight)

    monkeypatch.setattr(deterministic_module, "round_weight", watched)
    model = deterministic(tmp_path, "bfloat16")
    gc.collect()
    assert len(originals) == len(matrices(model)) == 8
    assert not any(original() is not None for original in originals)
    assert most == 0, "matrices were held twice"


@pytest.mark.usefixtures("whole_numbers")
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_a_prompt_has_the_bits_that_it_has_without_the_flag(model_type: str, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path, seed=7)
    assert len(PROMPT) >= 24  # from which on all products of the other are in whole numbers
    models: list[Any] = [load_model(tmp_path, dtype="bfloat16", deterministic=is_asked) for is_asked in (True, False)]
    for model in models:
        model.compute_logits = lambda hidden: hidden
    ours, theirs = (run_paged(model, PROMPT) for model in models)
    assert torch.equal(ours, theirs)
    memory = models[0].layers[1].mlp.down.memory
    memory[-16:].view(torch.bfloat16)[3] *= 2  # a power of a group of inputs, for one output
    assert not torch.equal(run_paged(models[0], PROMPT), theirs)


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        ({}, {"dtype": "bfloat16"}, True),
        ({"tie_word_embeddings": True}, {"dtype": "bfloat16"}, True),
        (
            {"intermediate_size": 96},
            {"dtype": "bfloat16"},
            False,
        ),  # no groups of 64: many rows are rounded, few are not
        ({}, {"dtype": "bfloat16", "quantization": "int8"}, False),
        ({}, {"dtype": "bfloat16", "group": member(0, 2)}, False),
    ],
)
@pytest.mark.usefixtures("whole_numbers")
def test_the_promise_is_kept_unasked_where_that_costs_nothing(
    overrides: dict[str, Any], options: dict[str, Any], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_has_tiles", lambda: False)
    save_tiny_model("qwen3", tmp_path, seed=8, **overrides)
    assert costs_nothing(load_model(tmp_path, deterministic=False, **options)) is expected
    model: Any = load_model(tmp_path, **options)
    assert model.is_deterministic is expected
    assert not load_model(tmp_path, deterministic=False, **options).is_deterministic  # type: ignore[attr-defined]
    if expected:
        check_every_way(model)


@pytest.mark.usefixtures("whole_numbers")
def test_a_tied_head_that_is_stored_as_well_is_rounded_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_has_tiles", lambda: False)
    save_tiny_model("qwen3", tmp_path, seed=8, tie_word_embeddings=True)
    once: Any = load_model(tmp_path, dtype="bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    head = stored["model.embed_tokens.weight"].clone()
    save_file({**stored, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    twice: Any = load_model(tmp_path, dtype="bfloat16")
    assert isinstance(twice.vocabulary.head, RoundedWeight) and twice.is_deterministic
    assert torch.equal(run_paged(twice, PROMPT), run_paged(once, PROMPT))


@pytest.mark.parametrize("is_ours", [True, False])
def test_floats_are_summed_in_one_order_unasked_where_our_kernels_are_the_quickest(
    is_ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_torch_has_avx512", lambda: not is_ours)
    save_tiny_model("llama", tmp_path, seed=8)
    model: Any = load_model(tmp_path, dtype="float32")
    assert model.is_deterministic is is_ours
    if is_ours:
        check_every_way(model)


def test_a_model_served_through_transformers_is_refused(tmp_path: Path) -> None:
    save_tiny_model("gpt2", tmp_path)
    with pytest.raises(UnsupportedModelError, match="is served through transformers, where a token's last bits change"):
        deterministic(tmp_path)
    save_tiny_model("llama", tmp_path / "native")
    with pytest.raises(UnsupportedModelError, match="Leave --deterministic out"):
        deterministic(tmp_path / "native", model_impl="transformers")


def test_an_option_that_the_native_class_lacks_is_refused_and_not_served_otherwise(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, hidden_act="tanh")
    with pytest.raises(UnsupportedModelError, match="cannot be served natively: activation 'tanh'"):
        deterministic(tmp_path)


def test_without_the_c_kernels_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model("llama", tmp_path)
    monkeypatch.setattr(linear_deterministic, "_kernels", lambda: None)
    with pytest.raises(UnsupportedModelError, match="install gcc or clang"):
        deterministic(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "gpt_oss"])
def test_on_a_gpu_attention_products_and_mixtures_are_asked_for_it(model_type: str, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path)
    model: Any = load_model(tmp_path, dtype="float32", deterministic=False)
    model.device = torch.device("cuda")
    made: Any = make_deterministic(model)
    assert made is model and model.group.sums_in_order
    for layer in model.layers:
        assert layer.attention.batch_invariant and layer.attention.linear is model.linear
        assert layer.mlp.linear is model.linear
        assert not isinstance(layer.mlp, MixtureOfExperts) or layer.mlp.batch_invariant
    assert getattr(model, "softcap", softcap_) is softcap_, (
        "torch's is elementwise there, and no element has neighbours"
    )


def test_on_other_devices_it_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    model: Any = load_model(tmp_path, dtype="float32", deterministic=False)
    model.device = torch.device("mps")
    with pytest.raises(UnsupportedModelError, match="there are kernels for CPUs and CUDA, not for mps"):
        make_deterministic(model)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_attention_and_mixtures_hear_that_they_are_asked(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(model_type, tmp_path)
    model: Any = deterministic(tmp_path)
    asked: list[bool] = []

    def attention(*given: Any, batch_invariant: bool = False) -> torch.Tensor:
        asked.append(batch_invariant)
        return paged_attention(*given)

    def mixture(*given: Any, batch_invariant: bool = False) -> torch.Tensor:
        asked.append(batch_invariant)
        return mixture_ref(*given)

    monkeypatch.setattr(Decoder, "stack", None)  # whose attention keeps the promise anyway
    monkeypatch.setattr(attention_of_layers, "paged_attention", attention)
    monkeypatch.setattr(mixture_kernels, "mixture", mixture)
    if model_type == "gpt_oss":
        for layer in model.layers:
            layer.mlp.stack_experts()
    run_paged(model, PROMPT)
    assert asked == [True] * len(model.layers) * (2 if model_type == "gpt_oss" else 1)


def test_logits_that_ranks_have_put_together_are_capped_whatever_each_has_of_the_vocabulary(tmp_path: Path) -> None:
    save_tiny_model("gemma2", tmp_path, seed=5, vocab_size=257)
    group = member(0, 2)
    group._gather_columns = lambda x: (x, x)  # type: ignore[method-assign]  # as if the other had computed the same
    model = deterministic(tmp_path, group=group)
    assert isinstance(model, Decoder)
    hidden = torch.randn(3, model._hidden_size, generator=torch.Generator().manual_seed(1))
    logits = model.compute_logits(hidden)
    assert logits.shape == (3, 257)
    assert torch.equal(logits[:, 129:], logits[:, :128])
    assert all(torch.equal(model.compute_logits(hidden[row : row + 1])[0], logits[row]) for row in range(3))
