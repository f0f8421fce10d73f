"""What is compiled ahead for a rank, and for each kind of weights, is what its start launches: no more, no less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_checkpoints import KINDS, write_fp8
from quantized_checkpoints import Format, write_both
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

SCRIPT = Path(__file__).parents[3] / "compiled_and_launched.py"
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
TWO: dict[str, Any] = {"tensor_parallel_size": 2}

PRESETS: dict[str, dict[str, Any]] = {
    "half of each layer": {"preset": "qwen3-0.6b", "num_layers": 3, "rank": 1, **TWO},
    "half in MXFP4, adds biases": {"preset": "gpt-oss-20b", "num_layers": 2, "in_mxfp4": True, "rank": 0, **TWO},
    "half in MXFP4": {"preset": "gpt-oss-20b", "num_layers": 2, "in_mxfp4": True, "rank": 1, **TWO},
    "half of the experts": {
        **{"preset": "qwen3-30b-a3b", "num_layers": 1, "rank": 1, "expert_parallel": True},
        **TWO,
    },
    "first stage": {"preset": "qwen3-0.6b", "num_layers": 4, "rank": 0, "pipeline_parallel_size": 2},
    "last stage": {"preset": "qwen3-0.6b", "num_layers": 4, "rank": 1, "pipeline_parallel_size": 2},
}

# Zero points or none, inputs in an order of their own or not, codes of 4 and 8 bits; dense and of experts.
FORMATS = {
    "GPTQ": Format("gptq"),
    "GPTQ, symmetric": Format("gptq", symmetric=True, group_size=64),
    "GPTQ, desc_act": Format("gptq", desc_act=True),
    "AWQ": Format("awq"),
    "compressed-tensors, int4": Format("compressed-tensors", symmetric=True),
    "compressed-tensors, int8": Format("compressed-tensors", bits=8, group_size=-1, symmetric=True, packed=False),
    "compressed-tensors, int8, zero points": Format("compressed-tensors", bits=8, group_size=64),
}
OF_EXPERTS = {"GPTQ", "compressed-tensors, int8"}


def without_dtype(source: Path, folder: Path) -> Path:
    """The checkpoint, in the dtype that its tensors have."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "dtype"}))
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_tiny_model("llama", folder / "dense", **SIZES)
    save_tiny_model("qwen3_moe", folder / "mixture", moe_intermediate_size=128, **SIZES)
    questions = dict(PRESETS)
    for name, made in FORMATS.items():
        write_both(folder / "dense", folder / name, folder / f"{name} floating", made)
        questions[name] = {"model_path": str(folder / name), "dtype": "bfloat16", "rank": 0}
    for name in OF_EXPERTS:
        path = folder / f"{name}, experts"
        write_both(folder / "mixture", path, folder / f"{name}, experts floating", FORMATS[name])
        questions[f"{name}, experts"] = {"model_path": str(path), "dtype": "bfloat16", "rank": 0}
    for kind in KINDS:
        write_fp8(folder / "dense", folder / f"fp8, {kind}", folder / f"fp8, {kind}, floating", kind)
        questions[f"fp8, {kind}"] = {"model_path": str(folder / f"fp8, {kind}"), "dtype": "bfloat16", "rank": 0}
    write_fp8(folder / "dense", folder / "kept", folder / "kept, floating", "blocks", keep="down_proj")
    questions["fp8, one left floating"] = {"model_path": str(folder / "kept"), "dtype": "bfloat16", "rank": 0}
    questions["fp8, blocks, half"] = questions["fp8, blocks"] | TWO | {"rank": 1}
    questions["of no stated dtype"] = {"model_path": str(without_dtype(folder / "dense", folder / "bare")), "rank": 0}
    questions["GPTQ, half"] = questions["GPTQ"] | TWO | {"rank": 1}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(list(questions.values()))],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    return dict(zip(questions, map(json.loads, lines), strict=True))


def names(keys: list[str]) -> set[str]:
    return {key.split()[0] for key in keys}


@pytest.mark.parametrize("name", PRESETS)
def test_a_ranks_kernels_are_compiled_ahead(name: str, answers: dict[str, tuple[list[str], list[str]]]) -> None:
    compiled, launched = answers[name]
    assert compiled == launched
    assert len(compiled) >= 9
    assert ("choose_kernel" in names(compiled)) == ("pipeline_parallel_size" not in PRESETS[name])


@pytest.mark.parametrize(
    "name",
    [*FORMATS, *(f"{name}, experts" for name in sorted(OF_EXPERTS)), "GPTQ, half"],
)
def test_products_with_a_checkpoints_codes_are_compiled_ahead(
    name: str, answers: dict[str, tuple[list[str], list[str]]]
) -> None:
    compiled, launched = answers[name]
    assert compiled == launched
    assert {"_codes_kernel", "_widen_kernel"} <= names(compiled)
    assert ("_codes_up_kernel" in names(compiled)) == name.endswith("experts")


@pytest.mark.parametrize("name", [*KINDS, "one left floating", "blocks, half"])
def test_products_with_a_checkpoints_fp8_are_compiled_ahead(
    name: str, answers: dict[str, tuple[list[str], list[str]]]
) -> None:
    compiled, launched = answers[f"fp8, {name}"]
    assert compiled == launched
    assert {"_tiles_kernel", "_fp8_skinny_kernel"} <= names(compiled)


def test_floats_are_compiled_for_in_the_dtype_that_they_are_stored_in(
    answers: dict[str, tuple[list[str], list[str]]],
) -> None:
    compiled, launched = answers["of no stated dtype"]
    assert compiled == launched
    assert any("*fp16" in key for key in compiled)
    assert not any("*bf16" in key for key in compiled)


def test_ranks_and_formats_that_launch_different_kernels_are_told_apart(
    answers: dict[str, tuple[list[str], list[str]]],
) -> None:
    """Or the tests above would compare what is always the same."""
    compiled = {name: tuple(both[0]) for name, both in answers.items()}
    for one, other in (
        ("half in MXFP4, adds biases", "half in MXFP4"),
        ("first stage", "last stage"),
        ("GPTQ", "GPTQ, symmetric"),
        ("compressed-tensors, int8", "compressed-tensors, int8, zero points"),
        ("GPTQ", "GPTQ, half"),
        ("fp8, blocks", "fp8, blocks, half"),
        ("fp8, blocks", "fp8, one left floating"),
        ("fp8, channel", "fp8, static"),
    ):
        assert compiled[one] != compiled[other], (one, other)
