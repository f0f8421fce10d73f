"""Writes small checkpoints in the formats of GPTQ, AWQ and compressed-tensors, each with the floats that it stands for.

The packers follow the published rules element by element and share nothing with the loaders that they test:

- GPTQ: AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py, `pack`; `gptq_v2` keeps zero points as they are.
- AWQ: AutoAWQ, awq/modules/linear/gemm.py, `from_linear`, with `order_map = [0, 2, 4, 6, 1, 3, 5, 7]`.
- compressed-tensors: compressors/pack_quantized/helpers.py, `pack_to_int32`; naive_quantized.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Format:
    """What to write; `group_size` -1 is one group for each output."""

    method: str
    bits: int = 4
    group_size: int = 32
    desc_act: bool = False
    checkpoint_format: str | None = "gptq"
    symmetric: bool = False
    packed: bool = True


@dataclass(frozen=True)
class Quantized:
    """One matrix `[out, in]`: unsigned codes, and scale and zero point of each group of each output."""

    codes: Codes
    zeros: Codes  # [out, groups]
    scales: torch.Tensor  # float16 [out, groups]
    group_of_input: Codes  # [in]

    def floats(self) -> torch.Tensor:
        """Exact in float32: 11 bits of scale times at most 9 of code less zero point."""
        group = torch.from_numpy(self.group_of_input)
        shifted = torch.from_numpy(self.codes) - torch.from_numpy(self.zeros)[:, group]
        return (shifted.double() * self.scales.double()[:, group]).float()


def quantize(weight: torch.Tensor, made: Format, rng: np.random.Generator) -> Quantized:
    """Round to the nearest code, with groups of neighbours or, with `desc_act`, of inputs at random."""
    out_features, in_features = weight.shape
    size = in_features if made.group_size == -1 else made.group_size
    groups = np.arange(in_features) // size
    if made.desc_act:
        groups = rng.permutation(groups)
    num_groups, top = in_features // size, 2**made.bits - 1
    scales = torch.zeros(out_features, num_groups, dtype=torch.float16)
    codes = np.zeros((out_features, in_features), dtype=np.int64)
    zeros = np.zeros((out_features, num_groups), dtype=np.int64)
    for group in range(num_groups):
        part = weight[:, torch.from_numpy(groups == group)].double()
        if made.symmetric:
            scale = (part.abs().amax(1) / (2 ** (made.bits - 1) - 1)).half()
            zero = torch.full_like(scale, 2 ** (made.bits - 1)).double()
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = ((high - low) / top).half()
            zero = (-low / scale.double()).round().clamp(0, top)
        code = (part / scale.double()[:, None] + zero[:, None]).round().clamp(0, top)
        codes[:, groups == group] = code.long().numpy()
        zeros[:, group], scales[:, group] = zero.long().numpy(), scale
    return Quantized(codes, zeros, scales, groups)


def pack(codes: Codes, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Consecutive codes along `axis` share a 32-bit word: place `i` of it holds code `order[i]`, lowest bits first."""
    per_word = 32 // bits
    columns = np.moveaxis(codes, axis, -1)
    width = -(-columns.shape[-1] // per_word) * per_word
    words = np.zeros((*columns.shape[:-1], width // per_word), dtype=np.uint32)
    for word in range(width // per_word):
        for place in range(per_word):
            column = word * per_word + (order[place] if order else place)
            if column < columns.shape[-1]:
                words[..., word] |= (columns[..., column].astype(np.uint32) & (2**bits - 1)) << (bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def stored_tensors(layer: str, quantized: Quantized, made: Format) -> dict[str, torch.Tensor]:
    """The tensors of one layer as the format has them."""
    q, bits = quantized, made.bits
    if made.method == "gptq":
        shift = 0 if made.checkpoint_format == "gptq_v2" else 1
        return {
            f"{layer}.qweight": pack(q.codes.T, bits, axis=0),
            f"{layer}.qzeros": pack((q.zeros.T - shift) % 2**bits, bits, axis=1),
            f"{layer}.scales": q.scales.T.contiguous(),
            f"{layer}.g_idx": torch.from_numpy(q.group_of_input).int(),
            f"{layer}.bias": torch.zeros(q.codes.shape[0], dtype=torch.float16),  # AutoGPTQ adds them to all
        }
    if made.method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            f"{layer}.qweight": pack(q.codes.T, bits, axis=1, order=order),
            f"{layer}.qzeros": pack(q.zeros.T, bits, axis=1, order=order),
            f"{layer}.scales": q.scales.T.contiguous(),
        }
    tensors = {f"{layer}.weight_scale": q.scales}
    if made.packed:
        tensors[f"{layer}.weight_packed"] = pack(q.codes, bits, axis=1)
        tensors[f"{layer}.weight_shape"] = torch.tensor(q.codes.shape)
    else:
        tensors[f"{layer}.weight"] = torch.from_numpy(q.codes - 128).to(torch.int8)
    if not made.symmetric:
        zeros = pack(q.zeros, bits, axis=0) if made.packed else torch.from_numpy(q.zeros - 128).to(torch.int8)
        tensors[f"{layer}.weight_zero_point"] = zeros
    if made.desc_act:
        tensors[f"{layer}.weight_g_idx"] = torch.from_numpy(q.group_of_input).int()
    return tensors


def quantization_config(made: Format) -> dict[str, Any]:
    """What config.json says about it."""
    if made.method == "gptq":
        stated: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": made.bits,
            "group_size": made.group_size,
            "desc_act": made.desc_act,
            "sym": made.symmetric,
            "damp_percent": 0.1,
            "true_sequential": True,
            "model_seqlen": 2048,
        }
        return stated if made.checkpoint_format is None else {**stated, "checkpoint_format": made.checkpoint_format}
    if made.method == "awq":
        return {
            "quant_method": "awq",
            "bits": made.bits,
            "group_size": made.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }
    weights = {
        "num_bits": made.bits,
        "type": "int",
        "symmetric": made.symmetric,
        "strategy": "channel" if made.group_size == -1 else "group",
        "group_size": None if made.group_size == -1 else made.group_size,
        "actorder": "group" if made.desc_act else None,
        "dynamic": False,
        "observer": "minmax",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if made.packed else "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def write_both(source: Path, quantized: Path, floating: Path, made: Format, *, keep: str = "lm_head") -> None:
    """Quantise a floating checkpoint's projections into `quantized`, and write what they stand for into `floating`.

    Args:
        keep: layers whose name contains this stay as they are.
    """
    rng = np.random.default_rng(0)
    packed: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        floats[name] = packed[name] = tensor
        if name.endswith("_proj.weight") and keep not in name:
            layer = name.removesuffix(".weight")
            made_of = quantize(tensor, made, rng)
            floats[name] = made_of.floats()
            del packed[name]
            biases = {key: value for key, value in packed.items() if key == f"{layer}.bias"}
            packed |= stored_tensors(layer, made_of, made) | biases
        elif name.endswith("_proj.bias"):
            packed[name] = tensor
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, changes in (
        (quantized, packed, {"quantization_config": quantization_config(made)}),
        (floating, floats, {}),
    ):
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
