"""Writes small checkpoints whose linear layers are in fp8, each with the floats that it stands for.

The formats follow what publishers write and share nothing with the loaders that they test:

- `blocks`: Qwen3-8B-FP8, DeepSeek-V3: `quant_method` fp8, `weight_scale_inv` of each 128 times 128, inputs by token.
- `matrix`: AutoFP8: `quant_method` fp8, one `weight_scale`, static inputs with one `input_scale`.
- `channel`, `compressed blocks`, `static`: compressed-tensors, float-quantized, as llm-compressor's FP8_DYNAMIC,
  FP8_BLOCK and FP8.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

KINDS = ("blocks", "matrix", "channel", "compressed blocks", "static")
STATIC = ("matrix", "static")
BY_BLOCK = ("blocks", "compressed blocks")


def quantization_config(kind: str) -> dict[str, Any]:
    if kind == "blocks":
        return {
            **{"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"},
            **{"weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
        }
    if kind == "matrix":
        return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    of_all = {"num_bits": 8, "type": "float", "symmetric": True, "actorder": None, "observer": None}
    weights, inputs = {
        "channel": ({"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
        "compressed blocks": (
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
        "static": ({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
    }[kind]
    group = {
        **{"targets": ["Linear"], "output_activations": None, "format": "float-quantized"},
        **{"weights": {**of_all, "dynamic": False, **weights}, "input_activations": {**of_all, **inputs}},
    }
    return {
        **{"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}},
        **{"kv_cache_scheme": None, "ignore": ["lm_head"], "quantization_status": "compressed"},
    }


def quantize(weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a layer by their last names, and the floats that they stand for."""
    rows, columns = {"channel": (1, weight.shape[1])}.get(kind, tuple(weight.shape))
    if kind in BY_BLOCK:
        rows = columns = 128
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    if kind in ("blocks", "channel"):
        scales = scales.bfloat16()
    floats = torch.empty_like(weight, dtype=torch.float64)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            here = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
            scales[row, column] = weight[here].abs().max() / 440
            codes[here] = (weight[here] / scales[row, column].float()).to(torch.float8_e4m3fn)
            floats[here] = codes[here].double() * scales[row, column].double()
    if kind == "matrix":
        scales = scales.view(())
    elif kind == "static":
        scales = scales.view(1)
    stored = {"weight": codes, "weight_scale_inv" if kind == "blocks" else "weight_scale": scales}
    if kind in STATIC:
        stored["input_scale"] = torch.tensor(0.02) if kind == "matrix" else torch.tensor([0.02])
    return stored, floats.float()


def write_fp8(source: Path, quantized: Path, floating: Path, kind: str, *, keep: str = "lm_head") -> None:
    """Quantise a floating checkpoint's projections into `quantized`, and write what they stand for into `floating`.

    Args:
        keep: layers whose name contains this stay as they are.
    """
    packed: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight") and keep not in name:
            stored, floats[name] = quantize(tensor, kind)
            packed |= {f"{name.removesuffix('weight')}{suffix}": each for suffix, each in stored.items()}
        else:
            packed[name] = floats[name] = tensor
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, changes in (
        (quantized, packed, {"quantization_config": quantization_config(kind)}),
        (floating, floats, {}),
    ):
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
