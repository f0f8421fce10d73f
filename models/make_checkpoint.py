"""Write a random checkpoint in the shape of a known model, for benchmarks: all of its cost, none of its sense.

python -m octavo.models.make_checkpoint --like qwen3-0.6b --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from .checkpoint import DEFAULT_MODEL, SHIPPED
from .registry import DTYPES

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Shapes as the models' own config.json files have them.
PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA3_ROPE,
        "tie_word_embeddings": False,
    },
}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_MAX_SHARD_BYTES = 2 * 1024**3


def make_checkpoint(
    like: str,
    out: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    num_layers: int | None = None,
    tokenizer: Path | None = SHIPPED / DEFAULT_MODEL,
    **overrides: Any,
) -> int:
    """Write config.json, safetensors shards and a tokenizer to `out`.

    Args:
        like: a key of `PRESETS`.
        num_layers: cut the model to this many layers; None keeps them all.
        tokenizer: folder whose tokenizer is copied; its vocabulary may be smaller than the model's, the rest of the
            ids then mean nothing. None writes none.
        overrides: fields of the configuration.

    Returns:
        The number of parameters.
    """
    values = {**PRESETS[like], **overrides}
    if num_layers is not None:
        values["num_hidden_layers"] = num_layers
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        values |= _copy_tokenizer(tokenizer, out, values["vocab_size"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(out)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name not in tied}

    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(shapes, dtype))
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        tensors = {name: _random_weight(shapes[name], config.initializer_range, dtype, generator) for name in names}
        file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    num_parameters: int = sum(shape.numel() for shape in shapes.values())
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": num_parameters * dtype.itemsize}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2))
    return num_parameters


def _random_weight(shape: torch.Size, deviation: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Norms (the only vectors in the presets) are ones, the rest normal."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator).to(dtype)


def _shards(shapes: dict[str, torch.Size], dtype: torch.dtype) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = shape.numel() * dtype.itemsize
        if names and size + num_bytes > _MAX_SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _copy_tokenizer(folder: Path, out: Path, vocab_size: int) -> dict[str, Any]:
    """Copy the tokenizer's files; return the special ids that belong to it."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json; name another folder, or ask for no tokenizer")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    added = [token["id"] for token in vocabulary.get("added_tokens", [])]
    size = 1 + max([*vocabulary["model"]["vocab"].values(), *added])
    if size > vocab_size:
        raise ValueError(f"the tokenizer in {folder} has {size} tokens, the model only {vocab_size}")
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    config = folder / "config.json"
    fields = json.loads(config.read_text()) if config.is_file() else {}
    return {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def main(argv: list[str] | None = None) -> int:
    """Command line of `make_checkpoint`."""
    parser = argparse.ArgumentParser(prog="python -m octavo.models.make_checkpoint", description=__doc__)
    parser.add_argument("--like", choices=sorted(PRESETS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--num-layers", type=int, default=None, help="cut the model to its first layers")
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED / DEFAULT_MODEL, help="folder to copy it from")
    parser.add_argument("--no-tokenizer", action="store_true")
    options = parser.parse_args(argv)
    if options.num_layers is not None and options.num_layers < 1:
        parser.error("--num-layers must be at least 1")
    try:
        num_parameters = make_checkpoint(
            options.like,
            options.out,
            seed=options.seed,
            dtype=DTYPES[options.dtype],
            num_layers=options.num_layers,
            tokenizer=None if options.no_tokenizer else options.tokenizer,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {num_parameters / 1e6:,.1f} M parameters in {options.dtype}, shaped like {options.like}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
