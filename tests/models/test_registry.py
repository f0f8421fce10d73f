import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model, tiny_config

from octavo.models import registry
from octavo.models.errors import ModelNotFoundError, QuantizedModelError, UnsupportedModelError
from octavo.models.gemma import GemmaForCausalLM
from octavo.models.gpt_oss import GptOssForCausalLM
from octavo.models.llama import LlamaForCausalLM
from octavo.models.registry import load_config, load_model, resolve_dtype

CPU = torch.device("cpu")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("model_type", registry.NATIVE)
def test_native_families_are_served_natively_by_default(model_type: str, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, LlamaForCausalLM | GemmaForCausalLM | GptOssForCausalLM)
    assert model.vocab_size == 256
    assert model.max_position == 512
    assert model.dtype == torch.float32
    assert len(model.kv_cache_specs) == tiny_config(model_type).num_hidden_layers
    assert {spec.num_kv_heads for spec in model.kv_cache_specs} == {2}


def test_other_families_asked_for_natively_are_refused_with_the_list_of_native_ones(tmp_path: Path) -> None:
    save_tiny_model("gpt2", tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel, which has no native.*LlamaForCausalLM"):
        load_model(tmp_path, model_impl="native")


@pytest.mark.parametrize("impl", ["auto", "native", "transformers"])
def test_checkpoints_quantised_by_other_methods_are_refused_by_every_implementation(
    impl: registry.ModelImpl, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "bitnet", "bits": 2})
    with pytest.raises(QuantizedModelError, match=r"quantised \(bitnet\)"):
        load_model(tmp_path, model_impl=impl)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    tiny_config("t5").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load_model(tmp_path)


def test_another_head_of_a_native_family_is_not_taken_for_a_language_model(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    edit_config(tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification"):
        load_model(tmp_path, model_impl="native")


def test_an_option_the_native_class_lacks_falls_back_to_transformers_only_in_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.models import transformers_backend

    save_tiny_model("llama", tmp_path)
    edit_config(tmp_path, hidden_act="quick_gelu")
    asked: list[torch.dtype] = []

    def fallback(path: Path, config: Any, *, dtype: torch.dtype, **_: Any) -> str:
        asked.append(dtype)
        return f"{config.hidden_act} through transformers"

    monkeypatch.setattr(transformers_backend, "load_transformers_model", fallback)
    assert load_model(tmp_path) == "quick_gelu through transformers"
    assert asked == [torch.float32]
    with pytest.raises(UnsupportedModelError, match=r"cannot be served natively: activation 'quick_gelu'"):
        load_model(tmp_path, model_impl="native")


def test_folders_without_a_readable_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="cannot use the configuration"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "made_up"}')
    with pytest.raises(UnsupportedModelError, match="made_up"):
        load_config(tmp_path)


def test_code_that_a_checkpoint_brings_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    witness = tmp_path / "it_ran"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "made_up", "auto_map": {"AutoConfig": "code.MadeUp"}})
    )
    (tmp_path / "code.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load_config(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("asked", "stored", "has_bfloat16", "expected"),
    [
        ("auto", torch.float32, True, torch.float32),
        ("auto", torch.bfloat16, True, torch.bfloat16),
        ("auto", torch.bfloat16, False, torch.float32),
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", torch.float16, True, torch.float32),
        ("auto", torch.float64, True, torch.float32),
        ("bfloat16", torch.float32, False, torch.bfloat16),
        ("float16", torch.bfloat16, False, torch.float16),
    ],
)
def test_auto_takes_the_checkpoints_dtype_unless_the_cpu_would_emulate_it(
    asked: str, stored: Any, has_bfloat16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16})
    config = tiny_config("llama")
    config.dtype = stored
    assert resolve_dtype(asked, config, Path(), CPU, native=False) == expected


@pytest.mark.parametrize(
    ("native", "kernels_built", "larger_than_caches", "has_bfloat16", "expected"),
    [
        (True, True, True, False, torch.bfloat16),
        (True, True, False, False, torch.float32),
        (True, True, False, True, torch.float32),
        (True, False, True, False, torch.float32),
        (True, False, True, True, torch.bfloat16),
        (False, True, True, False, torch.float32),
        (False, True, False, True, torch.bfloat16),
    ],
)
def test_auto_keeps_bfloat16_for_native_models_larger_than_caches_where_our_kernels_or_instructions_are(
    native: bool,
    kernels_built: bool,
    larger_than_caches: bool,
    has_bfloat16: bool,
    expected: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16})
    monkeypatch.setattr(registry.cpu_build, "library", lambda: object() if kernels_built else None)
    monkeypatch.setattr(registry, "_LARGER_THAN_CACHES", 1000 if larger_than_caches else 1_000_000_000)
    save_tiny_model("llama", tmp_path).bfloat16().save_pretrained(tmp_path)
    assert resolve_dtype("auto", load_config(tmp_path), tmp_path, CPU, native=native) == expected


def test_auto_looks_into_the_weights_where_the_configuration_names_no_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    save_tiny_model("llama", tmp_path).bfloat16().save_pretrained(tmp_path)
    config = load_config(tmp_path)
    config.dtype = None
    assert resolve_dtype("auto", config, tmp_path, CPU, native=False) == torch.bfloat16


def test_an_unknown_dtype_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    with pytest.raises(UnsupportedModelError, match="'int3' is not one of auto, float32, bfloat16, float16"):
        load_model(tmp_path, dtype="int3")
