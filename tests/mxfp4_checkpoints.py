"""Tiny GPT-OSS checkpoints with experts in MXFP4, and the floating model that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

PROJECTIONS = ("gate_up_proj", "down_proj")


def save_mxfp4_model(folder: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a tiny GPT-OSS whose experts are random bytes; returns what `transformers` makes of it, in float32."""
    model = save_tiny_model("gpt_oss", folder, seed, **overrides)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    floating = {}
    for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
        num_experts, in_features, out_features = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (num_experts, out_features, in_features // 32, 16), generator=generator)
        scales = torch.randint(121, 125, blocks.shape[:-1], generator=generator)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks.to(torch.uint8), scales.to(torch.uint8)
        floating[name] = convert_moe_packed_tensors(blocks.to(torch.uint8), scales, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    _, unexpected = model.load_state_dict(floating, strict=False)
    assert not unexpected and floating
    return model
