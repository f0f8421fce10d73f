"""Checkpoints in fp8 against the floats that they stand for: as floats, and as codes where a GPU multiplies those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fp8_checkpoints import BY_BLOCK, KINDS, STATIC, quantization_config, write_fp8
from paged_runner import greedy_paged, run_paged
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids, save_tiny_model

from octavo.kernels.fp8_weight import Fp8Weight
from octavo.kernels.linear_fp8 import linear_fp8_ref, round_inputs_ref
from octavo.kernels.quantized_weight import LinearWeight
from octavo.models import registry, weights
from octavo.models.decoder import Decoder
from octavo.models.device_loading import DeviceLoader, FileRange, Piece
from octavo.models.errors import QuantizedModelError, UnsupportedModelError, WeightsError
from octavo.models.layers import Linear
from octavo.models.mlp import GatedMLP
from octavo.models.quantization import fp8
from octavo.models.quantization.fp8 import Fp8Reader
from octavo.models.quantization.reader import inseparable_inputs, open_weights
from octavo.models.quantization.scheme import read_scheme
from octavo.models.registry import load_model

CPU = torch.device("cpu")
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny_model("llama", folder, **SIZES)
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(source: Path, tmp_path: Path, kind: str, **options: Any) -> tuple[Path, Path]:
    quantized, floating = tmp_path / "quantized", tmp_path / "floating"
    write_fp8(source, quantized, floating, kind, **options)
    return quantized, floating


@pytest.fixture
def keeps_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU passes for a GPU that multiplies fp8; `linear_fp8` says there what it means."""
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda _device: True)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Fp8Reader:
    reader = open_weights(folder, dtype=dtype, device=CPU, quantization=read_scheme(folder))
    assert isinstance(reader, Fp8Reader)
    return reader


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Write other tensors of a layer's query projection, or none, in place of the file's."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for suffix, tensor in changes.items():
        tensors.pop(f"{ATTENTION}.q_proj.{suffix}", None)
        if tensor is not None:
            tensors[f"{ATTENTION}.q_proj.{suffix}"] = tensor
    save_file(tensors, path)


def test_elsewhere_than_on_such_a_gpu_the_floats_are_read_and_their_tokens_come(
    kind: str, source: Path, tmp_path: Path
) -> None:
    quantized, floating = make(source, tmp_path, kind)
    prompt = random_token_ids(20)
    model = load_model(quantized, dtype="float32")
    exact = load_file(floating / "model.safetensors")
    with opened(quantized) as reader:
        name = f"{MLP}.down_proj.weight"
        assert torch.equal(_tensor(reader.take_linear(name, 256, 384)), exact[name])
    assert greedy_paged(model, prompt, 12) == greedy_paged(load_model(floating, dtype="float32"), prompt, 12)


def test_in_bfloat16_they_are_what_the_floats_become_there(kind: str, source: Path, tmp_path: Path) -> None:
    quantized, floating = make(source, tmp_path, kind)
    ours, theirs = (
        run_paged(load_model(each, dtype="bfloat16"), random_token_ids(9)) for each in (quantized, floating)
    )
    assert torch.equal(ours, theirs)


def _tensor(weight: LinearWeight) -> torch.Tensor:
    assert isinstance(weight, torch.Tensor)
    return weight


def test_a_float_is_rounded_once_to_the_models_dtype(kind: str, source: Path, tmp_path: Path) -> None:
    quantized, floating = make(source, tmp_path, kind)
    name = f"{ATTENTION}.o_proj.weight"
    exact = load_file(floating / "model.safetensors")[name]
    with opened(quantized, torch.float16) as reader:
        assert torch.equal(_tensor(reader.take_linear(name, *exact.shape)), exact.half())


@pytest.mark.usefixtures("keeps_codes")
def test_codes_stay_codes_and_stand_for_the_same_floats(kind: str, source: Path, tmp_path: Path) -> None:
    quantized, floating = make(source, tmp_path, kind)
    exact = load_file(floating / "model.safetensors")
    names = [f"{ATTENTION}.{each}_proj.weight" for each in "qkv"]
    with opened(quantized) as reader:
        fused = reader.take_fused_linear(names, [tuple(exact[name].shape) for name in names])
        down = reader.take_linear(f"{MLP}.down_proj.weight", 256, 384)
    for weight, floats in (
        (fused, torch.cat([exact[name] for name in names])),
        (down, exact[f"{MLP}.down_proj.weight"]),
    ):
        assert isinstance(weight, Fp8Weight)
        assert weight.codes.dtype is torch.float8_e4m3fn and weight.codes.is_contiguous()
        assert torch.equal(weight.dequantize(), floats)
        assert weight.group_size == (128 if kind in BY_BLOCK else floats.shape[1])
        assert (weight.input_scale is not None) == (kind in STATIC)
        assert weight.input_scale is None or weight.input_scale.tolist() == pytest.approx([0.02])


@pytest.mark.usefixtures("keeps_codes")
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_ranks_part_is_that_part_of_the_floats(rank: int, kind: str, source: Path, tmp_path: Path) -> None:
    quantized, floating = make(source, tmp_path, kind)
    exact = load_file(floating / "model.safetensors")
    rows = slice(rank * 100, rank * 100 + 100)  # within a block
    columns = slice(rank * 128, rank * 128 + 128)
    gate, up, down = (f"{MLP}.{each}_proj.weight" for each in ("gate", "up", "down"))
    with opened(quantized) as reader:
        fused = reader.take_fused_linear((gate, up), ((384, 256),) * 2, rows=(rows, rows))
        of_inputs = reader.take_linear(down, 256, 384, columns=columns)
        assert isinstance(fused, Fp8Weight) and isinstance(of_inputs, Fp8Weight)
        assert torch.equal(fused.dequantize(), torch.cat((exact[gate][rows], exact[up][rows])))
        assert torch.equal(of_inputs.dequantize(), exact[down][:, columns])
        if kind in BY_BLOCK:
            assert of_inputs.rows_per_scale == 128 and fused.rows_per_scale == 1
            with pytest.raises(UnsupportedModelError, match="inputs 64 to 128 tear blocks of 128 apart"):
                reader.take_linear(down, 256, 384, columns=slice(64, 128))
    assert inseparable_inputs(quantized, read_scheme(quantized)) == (128 if kind in BY_BLOCK else 1)


class _AtOnce:
    """Staging for a loader whose device is this CPU; counts the bytes of files that went through it."""

    num_bytes = 0

    def buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, piece: Piece, staged: torch.Tensor, ready: object) -> None:
        assert piece.dtype is piece.out.dtype  # or it would be cast on the way
        piece.out.copy_(piece.view(staged))
        _AtOnce.num_bytes += piece.num_bytes * isinstance(piece.source, FileRange)

    def finish(self) -> None:
        pass

    def staging(self) -> _AtOnce:
        return self

    def mark(self) -> object:
        return None


@pytest.mark.usefixtures("keeps_codes")
def test_codes_go_from_the_file_to_the_device_as_bytes(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, floating = make(source, tmp_path, kind)
    exact = load_file(floating / "model.safetensors")
    monkeypatch.setattr(weights, "loader_for", lambda _device: DeviceLoader(_AtOnce(), num_threads=2))
    monkeypatch.setattr(_AtOnce, "num_bytes", 0)
    gate, up = (f"{MLP}.{each}_proj.weight" for each in ("gate", "up"))
    with opened(quantized) as reader:
        fused = reader.take_fused_linear((gate, up), ((384, 256),) * 2)
        reader.settle()
    assert isinstance(fused, Fp8Weight)
    assert torch.equal(fused.dequantize(), torch.cat((exact[gate], exact[up])))
    assert _AtOnce.num_bytes == 2 * 384 * 256


@pytest.mark.usefixtures("keeps_codes")
def test_a_model_computes_with_rounded_inputs_in_all_its_linear_layers(kind: str, source: Path, tmp_path: Path) -> None:
    quantized, floating = make(source, tmp_path, kind)
    model, exact = (load_model(folder, dtype="float32", deterministic=False) for folder in (quantized, floating))
    assert isinstance(model, Decoder) and isinstance(exact, Decoder)

    def rounding(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        size = 128 if kind in BY_BLOCK else x.shape[1]
        codes, scales = round_inputs_ref(x, size, torch.tensor([0.02]) if kind in STATIC else None)
        return F.linear(codes.float() * scales.T.repeat_interleave(size, dim=1), weight, bias)

    prompt = random_token_ids(20)
    unrounded = run_paged(exact, prompt)
    exact.stack = None  # it would multiply as it did
    for layer in exact.layers:
        layer.attention.linear = Linear(rounding)
        layer.mlp.use(Linear(rounding), {})
    logits = run_paged(model, prompt)
    assert torch.equal(logits, run_paged(exact, prompt))
    assert not torch.equal(logits, unrounded)
    for each in model.layers:
        assert isinstance(each.mlp, GatedMLP)
        of_layer = (each.attention.qkv, each.attention.o, each.mlp.gate_up, each.mlp.down)
        assert all(isinstance(weight, Fp8Weight) for weight in of_layer)


@pytest.mark.usefixtures("keeps_codes")
def test_a_bias_is_added_to_a_product_of_codes(source: Path, tmp_path: Path) -> None:
    quantized, _ = make(source, tmp_path, "channel")
    model = load_model(quantized, dtype="float32")
    assert isinstance(model, Decoder)
    weight = model.layers[0].attention.o
    assert isinstance(weight, Fp8Weight)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.linear(x, weight, torch.ones(256)), linear_fp8_ref(x, weight) + 1)


@pytest.mark.usefixtures("keeps_codes")
def test_a_layer_left_floating_stands_beside_codes(kind: str, source: Path, tmp_path: Path) -> None:
    quantized, floating = make(source, tmp_path, kind, keep="layers.0.self_attn.k_proj")
    exact = load_file(floating / "model.safetensors")
    names = [f"{ATTENTION}.{each}_proj.weight" for each in "qkv"]
    with opened(quantized) as reader:
        fused = reader.take_fused_linear(names, [tuple(exact[name].shape) for name in names])
    assert isinstance(fused, tuple)
    assert [type(part) for part in fused] == [Fp8Weight, torch.Tensor, Fp8Weight]
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    model = load_model(quantized, dtype="float32")
    assert isinstance(model, Decoder)
    out = model.linear(x, model.layers[0].attention.qkv)
    torch.testing.assert_close(out[:, 256:384], x @ exact[names[1]].T)


@pytest.mark.usefixtures("keeps_codes")
def test_parts_whose_inputs_have_other_scales_stay_apart(source: Path, tmp_path: Path) -> None:
    quantized, _ = make(source, tmp_path, "static")
    edit_tensors(quantized, input_scale=torch.tensor([0.5]))
    model = load_model(quantized, dtype="float32")
    assert isinstance(model, Decoder)
    parts = model.layers[0].attention.qkv
    assert isinstance(parts, tuple) and [part.shape[0] for part in parts] == [256, 128, 128]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("blocks", {"weight_scale_inv": None}, "weight_scale_inv or weight_scale is missing"),
        ("blocks", {"weight_scale_inv": torch.ones(2, 1)}, r"its scales are \[2, 1\] instead of \[2, 2\]"),
        ("blocks", {"weight_scale_inv": torch.full((2, 2), float("nan"))}, "not all finite"),
        ("blocks", {"weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, "holds torch.int32"),
        ("blocks", {"weight": torch.zeros(256, 256)}, "weight holds torch.float32 instead of torch.float8_e4m3fn"),
        ("channel", {"weight_scale": torch.ones(255, 1)}, r"its scales are \[255, 1\] for 256 outputs"),
        ("static", {"input_scale": None}, "input_scale or activation_scale is missing"),
        ("static", {"input_scale": torch.tensor([0.0])}, r"is \[0.0\] instead of one number above 0"),
        ("channel", {"input_scale": torch.ones(1)}, "not part of the model.*q_proj.input_scale"),
        (
            "channel",
            {"weight": torch.zeros(255, 256).to(torch.float8_e4m3fn)},
            r"q_proj.weight \[255, 256\] instead of",
        ),
    ],
)
@pytest.mark.parametrize("as_codes", [True, False])
def test_tensors_that_do_not_fit_are_refused_by_name(
    kind: str,
    changes: dict[str, torch.Tensor | None],
    says: str,
    as_codes: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda _device: as_codes)
    quantized, _ = make(source, tmp_path, kind)
    edit_tensors(quantized, **changes)
    with pytest.raises(WeightsError, match=says):
        load_model(quantized, dtype="float32")


def _changed(kind: str, part: str, **changes: Any) -> dict[str, Any]:
    """The quantization_config of a kind with other fields of its only group's weights or input_activations."""
    config = quantization_config(kind)
    group = config["config_groups"]["group_0"]
    return {**config, "config_groups": {"group_0": {**group, part: {**group[part], **changes}}}}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({**quantization_config("blocks"), "weight_block_size": [64, 128]}, r"weight_block_size=\[64, 128\]"),
        ({**quantization_config("blocks"), "scale_fmt": "ue8m0"}, "scale_fmt='ue8m0'"),
        ({**quantization_config("blocks"), "fmt": "e5m2"}, "fmt='e5m2'"),
        ({**quantization_config("blocks"), "activation_scheme": "static"}, "activation_scheme='static'"),
        ({**quantization_config("matrix"), "kv_cache_scheme": "static"}, "kv_cache_scheme"),
        (_changed("channel", "weights", num_bits=4), "num_bits=4"),
        (_changed("channel", "weights", type="int"), "type='int'"),
        (_changed("channel", "weights", strategy="group"), "strategy='group'"),
        (_changed("channel", "input_activations", dynamic=False), "dynamic=False"),
        (_changed("static", "input_activations", dynamic=True), "dynamic=True"),
        (_changed("compressed blocks", "weights", block_structure=[128, 64]), "block_structure"),
        (_changed("compressed blocks", "input_activations", group_size=64), "group_size=64"),
        (_changed("compressed blocks", "input_activations", strategy="token"), "strategy='token'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    config: dict[str, Any], names: str, source: Path, tmp_path: Path
) -> None:
    stated = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(QuantizedModelError, match=names):
        read_scheme(tmp_path)


def test_weights_whose_inputs_are_not_rounded_are_refused(source: Path, tmp_path: Path) -> None:
    config = quantization_config("channel")
    config["config_groups"]["group_0"]["input_activations"] = None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(QuantizedModelError, match="input_activations=None"):
        read_scheme(tmp_path)


@pytest.mark.parametrize("is_gpu", [True, False])
def test_random_weights_are_of_the_kind_that_the_configuration_names(
    kind: str, is_gpu: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda _device: is_gpu)
    quantized, _ = make(source, tmp_path, kind)
    model = load_model(quantized, dtype="float32", load_format="dummy")
    assert isinstance(model, Decoder)
    qkv = model.layers[0].attention.qkv
    assert isinstance(qkv, Fp8Weight) == is_gpu
    assert not isinstance(model.vocabulary.head, Fp8Weight)
    if isinstance(qkv, Fp8Weight):
        stored = load_model(quantized, dtype="float32")
        assert isinstance(stored, Decoder)
        theirs = stored.layers[0].attention.qkv
        assert isinstance(theirs, Fp8Weight)
        assert qkv.shape == theirs.shape and qkv.scales.shape == theirs.scales.shape
        assert (qkv.rows_per_scale, qkv.group_size) == (theirs.rows_per_scale, theirs.group_size)
        assert (qkv.input_scale is None) == (theirs.input_scale is None)
    assert greedy_paged(model, random_token_ids(5), 2)


def test_random_weights_leave_aside_a_scheme_that_is_not_read(source: Path, tmp_path: Path) -> None:
    stated = json.loads((source / "config.json").read_text())
    stated["quantization_config"] = {**quantization_config("blocks"), "scale_fmt": "ue8m0"}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    config = registry.load_config(tmp_path)
    assert registry._random_weights(config, tmp_path, "auto", native=True).quantized_to is None
