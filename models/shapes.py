"""Configurations of well-known models, and folders that hold one of them without any weights: for benchmarks.

Importable without `transformers`. Sizes are those of the checkpoints' own config.json files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _qwen3(*, layers: int, hidden: int, heads: int, mlp: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": tied,
        **more,
    }


def _llama3(
    *, layers: int, hidden: int, heads: int, head_dim: int, mlp: int, tied: bool, factor: float
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": factor},
        "tie_word_embeddings": tied,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(layers=28, hidden=1024, heads=16, mlp=3072, tied=True),
    "qwen3-8b": _qwen3(layers=36, hidden=4096, heads=32, mlp=12288),
    "qwen3-14b": _qwen3(layers=40, hidden=5120, heads=40, mlp=17408),
    "qwen3-30b-a3b": _qwen3(
        layers=48,
        hidden=2048,
        heads=32,
        mlp=6144,
        model_type="qwen3_moe",
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "llama-3.2-1b": _llama3(layers=16, hidden=2048, heads=32, head_dim=64, mlp=8192, tied=True, factor=32.0),
    "llama-3.1-8b": _llama3(layers=32, hidden=4096, heads=32, head_dim=128, mlp=14336, tied=False, factor=8.0),
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
    },
}

# What `config.json` has beside a preset: a plain one is then read without `transformers`.
_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
_COMMON: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def write_config_folder(like: str, out: Path, *, tokenizer: Path | None, dtype: str = "bfloat16", **more: Any) -> None:
    """Write config.json and a tokenizer to `out`, and no weights: what `load_format="dummy"` needs.

    Args:
        like: a key of `PRESETS`.
        tokenizer: folder whose tokenizer is copied; ids beyond its vocabulary mean nothing. None copies none.
        more: fields of the configuration in place of the preset's.
    """
    values: dict[str, Any] = {**_COMMON, **PRESETS[like], **more}
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        values |= copy_tokenizer(tokenizer, out, values["vocab_size"])
    model_type = values["model_type"]
    if model_type == "gpt_oss":
        values["attention_bias"] = True
    values |= {"architectures": [_ARCHITECTURES[model_type]], "dtype": dtype}
    (out / "config.json").write_text(json.dumps(values, indent=2))


def copy_tokenizer(folder: Path, out: Path, vocab_size: int) -> dict[str, Any]:
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
