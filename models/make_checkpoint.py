"""Write a random checkpoint in the shape of a known model, for benchmarks: all of its cost, none of its sense.

python -m octavo.models.make_checkpoint --like qwen3-0.6b --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from .checkpoint import DEFAULT_MODEL, SHIPPED
from .registry import DTYPES
from .shapes import PRESETS as ALL_PRESETS
from .shapes import copy_tokenizer

# Checkpoints store the experts of a mixture under other names than a model's parameters have.
PRESETS = {name: preset for name, preset in ALL_PRESETS.items() if preset["model_type"] in ("llama", "qwen3")}

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
        values |= copy_tokenizer(tokenizer, out, values["vocab_size"])
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
