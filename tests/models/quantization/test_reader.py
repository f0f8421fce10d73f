"""Checkpoints of each format against the floats that they stand for."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from c_library import HAS_C
from paged_runner import assert_greedy_tokens_agree, greedy_paged, run_paged
from quantized_checkpoints import Format, write_both
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids, save_tiny_model

from octavo.kernels import cpu_build
from octavo.kernels.linear_quantized import linear_quantized
from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.models.errors import QuantizedModelError, UnsupportedModelError, WeightsError
from octavo.models.quantization.reader import QuantizingReader, open_weights
from octavo.models.quantization.scheme import read_scheme
from octavo.models.registry import load_model

CPU = torch.device("cpu")
LAYER = "model.layers.0.self_attn.q_proj"
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}

FORMATS = {
    "gptq-4": Format("gptq"),
    "gptq-4-v2": Format("gptq", checkpoint_format="gptq_v2"),
    "gptq-4-unnamed-format": Format("gptq", checkpoint_format=None, group_size=64),
    "gptq-4-desc-act": Format("gptq", desc_act=True),
    "gptq-4-one-group": Format("gptq", group_size=-1, symmetric=True),
    "gptq-8": Format("gptq", bits=8, group_size=64),
    "gptq-8-desc-act": Format("gptq", bits=8, desc_act=True, symmetric=True),
    "awq": Format("awq"),
    "awq-64": Format("awq", group_size=64),
    "compressed-4": Format("compressed-tensors", symmetric=True),
    "compressed-4-zeros": Format("compressed-tensors", group_size=64),
    "compressed-4-channel": Format("compressed-tensors", group_size=-1, symmetric=True),
    "compressed-4-order": Format("compressed-tensors", desc_act=True, symmetric=True),
    "compressed-8": Format("compressed-tensors", bits=8, symmetric=True),
    "compressed-8-channel": Format("compressed-tensors", bits=8, group_size=-1),
    "compressed-8-plain": Format("compressed-tensors", bits=8, group_size=-1, symmetric=True, packed=False),
    "compressed-8-plain-zeros": Format("compressed-tensors", bits=8, group_size=64, packed=False),
}


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of quantization_config; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    stated = {**config["quantization_config"], **changes}
    config["quantization_config"] = {name: value for name, value in stated.items() if value is not None}
    path.write_text(json.dumps(config))


def replace_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Write another tensor, or none, in place of one of the file's."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny_model("llama", folder, **SIZES)
    return folder


def make(source: Path, tmp_path: Path, made: Format, **options: Any) -> tuple[Path, Path]:
    quantized, floating = tmp_path / "quantized", tmp_path / "floating"
    write_both(source, quantized, floating, made, **options)
    return quantized, floating


@pytest.mark.parametrize("made", FORMATS.values(), ids=FORMATS)
def test_each_format_gives_the_exact_floats_their_products_and_their_tokens(
    made: Format, source: Path, tmp_path: Path
) -> None:
    quantized, floating = make(source, tmp_path, made)
    tensors = load_file(floating / "model.safetensors")
    reader = open_weights(quantized, dtype=torch.float32, device=CPU, quantization=read_scheme(quantized))
    with reader:
        for name in (f"{LAYER}.weight", "model.layers.1.mlp.down_proj.weight"):
            weight = reader.take_linear(name, *tensors[name].shape)
            assert isinstance(weight, QuantizedWeight)
            assert weight.bits == made.bits
            assert torch.equal(weight.dequantize(), tensors[name])
            x = torch.randn(3, weight.in_features, generator=torch.Generator().manual_seed(1))
            exact = x.double() @ tensors[name].double().T
            # The bound of a sum of n products in float32, in any order (Higham 2002, section 3.1).
            bound = weight.in_features * 2**-24 * (x.double().abs() @ tensors[name].double().abs().T)
            assert ((linear_quantized(x, weight).double() - exact).abs() <= bound * 1.01).all()
    prompt = random_token_ids(20)
    ours = greedy_paged(load_model(quantized, dtype="float32"), prompt, 12)
    assert ours == greedy_paged(load_model(floating, dtype="float32"), prompt, 12)


@pytest.mark.skipif(
    not HAS_C or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="there are no products in whole numbers",
)
@pytest.mark.parametrize("made", ["gptq-4", "awq", "compressed-8", "gptq-8-desc-act"])
def test_in_bfloat16_products_in_whole_numbers_give_the_tokens_too(made: str, source: Path, tmp_path: Path) -> None:
    quantized, floating = make(source, tmp_path, FORMATS[made])
    prompt = random_token_ids(20)
    model = load_model(quantized, dtype="bfloat16")
    tokens = prompt + greedy_paged(model, prompt, 12)
    exact = run_paged(load_model(floating, dtype="float32"), tokens)
    assert 2 < float(exact.std()) < 3  # beside which the tolerance is what bfloat16 loses
    assert_greedy_tokens_agree(exact, tokens, len(prompt), tolerance=0.25)
    in_floats = run_paged(load_model(quantized, dtype="bfloat16", deterministic=True), tokens, [len(prompt)])
    ours = run_paged(model, tokens, [len(prompt)])
    assert not torch.equal(ours[20:], in_floats[20:])  # one row at a time; many only where floats have no wider vectors
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not torch.equal(ours[:20], in_floats[:20])


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma3_text"])
def test_other_families_and_biases_are_read_too(model_type: str, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path / "source", **SIZES)
    made = Format("compressed-tensors", symmetric=True)
    quantized, floating = make(tmp_path / "source", tmp_path, made)
    prompt = random_token_ids(20)
    ours = greedy_paged(load_model(quantized, dtype="float32"), prompt, 12)
    assert ours == greedy_paged(load_model(floating, dtype="float32"), prompt, 12)


def test_a_layer_left_floating_is_read_as_it_is_beside_quantised_ones(source: Path, tmp_path: Path) -> None:
    quantized, floating = make(source, tmp_path, FORMATS["awq"], keep="layers.0.self_attn.k_proj")
    prompt = random_token_ids(20)
    ours = greedy_paged(load_model(quantized, dtype="float32"), prompt, 12)
    assert ours == greedy_paged(load_model(floating, dtype="float32"), prompt, 12)


@pytest.mark.parametrize(
    ("made", "changes", "names"),
    [
        ("gptq-4", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("gptq-4", {"bits": 3}, "bits=3"),
        ("gptq-4", {"bits": 4.0}, "bits=4.0"),
        ("gptq-4", {"group_size": 48}, "group_size=48"),
        ("gptq-4", {"group_size": 0}, "group_size=0"),
        ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ("gptq-4", {"dynamic": {"-:.*": {}}}, "dynamic"),
        ("awq", {"bits": 8}, "bits=8"),
        ("awq", {"version": "gemv"}, "version='gemv'"),
        ("awq", {"zero_point": False}, "zero_point=False"),
        ("compressed-4", {"format": "marlin-24"}, "format='marlin-24'"),
        ("compressed-4", {"config_groups": {}}, "config_groups"),
        ("compressed-4", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("compressed-4", {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, "type='float'"),
        (
            "compressed-4",
            {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
            "input_activations",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    made: str, changes: dict[str, Any], names: str, source: Path, tmp_path: Path
) -> None:
    quantized, _ = make(source, tmp_path, FORMATS[made])
    edit(quantized, **changes)
    with pytest.raises(QuantizedModelError, match=names):
        read_scheme(quantized)


@pytest.mark.parametrize(
    ("made", "tensor", "value", "says"),
    [
        ("gptq-4", "qweight", torch.zeros(16, 32, dtype=torch.int32), r"q_proj.qweight is \[16, 32\] instead of"),
        ("gptq-4", "qweight", torch.zeros(16, 64), r"q_proj.qweight holds torch.float32"),
        ("gptq-4", "qzeros", None, r"q_proj.qzeros is missing"),
        ("gptq-4", "scales", torch.zeros(4, 63), r"q_proj.scales is \[4, 63\]"),
        ("gptq-4", "scales", torch.full((4, 64), float("nan")), "not all finite"),
        ("gptq-4", "g_idx", torch.full((128,), 4, dtype=torch.int32), "g_idx names groups 4 to 4 of 4"),
        ("gptq-4", "g_idx", torch.full((128,), -1, dtype=torch.int32), "g_idx names groups -1"),
        ("gptq-4", "g_idx", torch.zeros(128, dtype=torch.int32), "as many inputs"),
        ("gptq-4", "bias", torch.ones(64), "not part of the model.*q_proj.bias"),
        ("awq", "qweight", torch.zeros(128, 7, dtype=torch.int32), r"q_proj.qweight is \[128, 7\]"),
        ("awq", "qzeros", torch.zeros(1, 8, dtype=torch.int32), r"q_proj.qzeros is \[1, 8\]"),
        ("compressed-4", "weight_shape", torch.tensor([64, 127]), r"weight_shape says \[64, 127\]"),
        ("compressed-4", "weight_scale", torch.zeros(64, 1), r"weight_scale is \[64, 1\]"),
        ("compressed-4-zeros", "weight_zero_point", None, "weight_zero_point is missing"),
        ("compressed-4", "weight_zero_point", torch.zeros(8, 4, dtype=torch.int32), "symmetric"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    made: str, tensor: str, value: torch.Tensor | None, says: str, source: Path, tmp_path: Path
) -> None:
    quantized, _ = make(source, tmp_path, FORMATS[made])
    replace_tensor(quantized, f"{LAYER}.{tensor}", value)
    with pytest.raises(WeightsError, match=says):
        load_model(quantized, dtype="float32")


def test_a_truncated_file_is_refused(source: Path, tmp_path: Path) -> None:
    quantized, _ = make(source, tmp_path, FORMATS["awq"])
    path = quantized / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_model(quantized, dtype="float32")


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_weights_quantised_at_load_mean_the_tokens_of_their_floats(model_type: str, to: Any, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path / "source", **SIZES)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tied = "lm_head.weight" not in tensors
    reader = QuantizingReader(tmp_path / "source", dtype=torch.float32, device=CPU, to=to)
    floats = dict(tensors)
    with reader:
        for name in list(tensors):
            if name.endswith("_proj.weight") or name == "lm_head.weight":
                weight = reader.take_linear(name, *tensors[name].shape)
                assert isinstance(weight, QuantizedWeight)
                assert weight.bits == (8 if to == "int8" or name == "lm_head.weight" else 4)
                floats[name] = weight.dequantize()
        if tied:  # the head alone is quantised: as floats the two are tied no more
            head = reader.tied_head(tensors["model.embed_tokens.weight"])
            assert isinstance(head, QuantizedWeight)
            floats["lm_head.weight"] = head.dequantize()
    floating = tmp_path / "floating"
    floating.mkdir()
    save_file(floats, floating / "model.safetensors")
    (floating / "config.json").write_text((tmp_path / "source" / "config.json").read_text())
    prompt = random_token_ids(20)
    ours = greedy_paged(load_model(tmp_path / "source", dtype="float32", quantization=to), prompt, 12)
    assert ours == greedy_paged(load_model(floating, dtype="float32"), prompt, 12)


def test_quantising_is_refused_where_it_cannot_be_done(source: Path, tmp_path: Path) -> None:
    quantized, _ = make(source, tmp_path, FORMATS["awq"])
    with pytest.raises(UnsupportedModelError, match=r"--quantization int8.*quantised \(awq\) already"):
        load_model(quantized, quantization="int8")
    with pytest.raises(QuantizedModelError, match="native"):
        load_model(quantized, model_impl="transformers")
    with pytest.raises(UnsupportedModelError, match=r"--quantization int4.*transformers"):
        load_model(source, quantization="int4", model_impl="transformers")


@pytest.mark.parametrize("to", ["awq", "int8", None])
@pytest.mark.parametrize("has_library", [True, False])
def test_quantised_weights_without_the_c_kernels_are_loaded_with_a_warning_that_says_what_to_do(
    to: str | None,
    has_library: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = make(source, tmp_path, FORMATS["awq"])[0] if to == "awq" else source
    monkeypatch.setattr(cpu_build, "library", lambda: object() if has_library else None)
    quantization = read_scheme(folder) if to == "awq" else to
    with (
        caplog.at_level(logging.WARNING),
        open_weights(
            folder,
            dtype=torch.float32,
            device=CPU,
            quantization=quantization,  # type: ignore[arg-type]
        ),
    ):
        pass
    assert ("install gcc or clang" in caplog.text) == (to is not None and not has_library)
