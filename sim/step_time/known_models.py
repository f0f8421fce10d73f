"""Common models by name, so that a plan needs no files. Sizes are those of the checkpoints' `config.json`."""

from __future__ import annotations

import difflib
from pathlib import Path

from ...messages.errors import ModelNotFoundError
from .config_shape import read_shape
from .model_shape import ModelShape

DEFAULT_MODEL = "llama-3.1-8b"

HUB_NAMES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-small-24b": "mistralai/Mistral-Small-24B-Base-2501",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
}
"""Where the checkpoints are on the hub; of those with several, one with these sizes."""


def _llama(
    name: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    tied: bool = False,
    head_dim: int = 128,
    vocab: int = 128256,
    max_len: int = 131072,
) -> ModelShape:
    return ModelShape(
        name=name,
        hub_name=HUB_NAMES[name],
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=vocab,
        max_model_len=max_len,
        tied_embeddings=tied,
    )


def _qwen3(name: str, *, layers: int, hidden: int, heads: int, mlp: int, tied: bool = False) -> ModelShape:
    return ModelShape(
        name=name,
        hub_name=HUB_NAMES[name],
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=mlp,
        vocab_size=151936,
        max_model_len=40960,
        tied_embeddings=tied,
        qk_norm=True,
    )


def _qwen25(name: str, *, layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> ModelShape:
    return ModelShape(
        name=name,
        hub_name=HUB_NAMES[name],
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=mlp,
        vocab_size=vocab,
        max_model_len=32768,
        attention_bias=128 * (heads + 2 * kv_heads),
    )


def _moe(
    name: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    experts: int,
    active: int,
    expert: int,
    vocab: int,
    max_len: int,
    qk_norm: bool,
) -> ModelShape:
    return ModelShape(
        name=name,
        hub_name=HUB_NAMES[name],
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=0,
        vocab_size=vocab,
        max_model_len=max_len,
        qk_norm=qk_norm,
        num_experts=experts,
        num_active_experts=active,
        expert_size=expert,
    )


KNOWN_MODELS: tuple[ModelShape, ...] = (
    _llama("llama-2-7b", layers=32, hidden=4096, heads=32, kv_heads=32, mlp=11008, vocab=32000, max_len=4096),
    _llama("llama-2-13b", layers=40, hidden=5120, heads=40, kv_heads=40, mlp=13824, vocab=32000, max_len=4096),
    _llama("llama-2-70b", layers=80, hidden=8192, heads=64, kv_heads=8, mlp=28672, vocab=32000, max_len=4096),
    _llama("llama-3-8b", layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, max_len=8192),
    _llama("llama-3-70b", layers=80, hidden=8192, heads=64, kv_heads=8, mlp=28672, max_len=8192),
    _llama("llama-3.1-8b", layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336),
    _llama("llama-3.1-70b", layers=80, hidden=8192, heads=64, kv_heads=8, mlp=28672),
    _llama("llama-3.1-405b", layers=126, hidden=16384, heads=128, kv_heads=8, mlp=53248),
    _llama("llama-3.2-1b", layers=16, hidden=2048, heads=32, kv_heads=8, mlp=8192, tied=True, head_dim=64),
    _llama("llama-3.2-3b", layers=28, hidden=3072, heads=24, kv_heads=8, mlp=8192, tied=True),
    _llama("llama-3.3-70b", layers=80, hidden=8192, heads=64, kv_heads=8, mlp=28672),
    _llama("mistral-7b", layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, vocab=32768, max_len=32768),
    _llama("mistral-small-24b", layers=40, hidden=5120, heads=32, kv_heads=8, mlp=32768, vocab=131072, max_len=32768),
    _qwen3("qwen3-0.6b", layers=28, hidden=1024, heads=16, mlp=3072, tied=True),
    _qwen3("qwen3-1.7b", layers=28, hidden=2048, heads=16, mlp=6144, tied=True),
    _qwen3("qwen3-4b", layers=36, hidden=2560, heads=32, mlp=9728, tied=True),
    _qwen3("qwen3-8b", layers=36, hidden=4096, heads=32, mlp=12288),
    _qwen3("qwen3-14b", layers=40, hidden=5120, heads=40, mlp=17408),
    _qwen3("qwen3-32b", layers=64, hidden=5120, heads=64, mlp=25600),
    _qwen25("qwen2.5-7b", layers=28, hidden=3584, heads=28, kv_heads=4, mlp=18944, vocab=152064),
    _qwen25("qwen2.5-32b", layers=64, hidden=5120, heads=40, kv_heads=8, mlp=27648, vocab=152064),
    _qwen25("qwen2.5-72b", layers=80, hidden=8192, heads=64, kv_heads=8, mlp=29568, vocab=152064),
    _moe(
        "mixtral-8x7b",
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        experts=8,
        active=2,
        expert=14336,
        vocab=32000,
        max_len=32768,
        qk_norm=False,
    ),
    _moe(
        "mixtral-8x22b",
        layers=56,
        hidden=6144,
        heads=48,
        kv_heads=8,
        experts=8,
        active=2,
        expert=16384,
        vocab=32768,
        max_len=65536,
        qk_norm=False,
    ),
    _moe(
        "qwen3-30b-a3b",
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        experts=128,
        active=8,
        expert=768,
        vocab=151936,
        max_len=40960,
        qk_norm=True,
    ),
    _moe(
        "qwen3-235b-a22b",
        layers=94,
        hidden=4096,
        heads=64,
        kv_heads=4,
        experts=128,
        active=8,
        expert=1536,
        vocab=151936,
        max_len=40960,
        qk_norm=True,
    ),
)


def _plain(name: str) -> str:
    """`meta-llama/Llama-3.1-8B-Instruct` -> `llama318b`."""
    plain = "".join(char for char in name.rsplit("/", 1)[-1].lower() if char.isalnum())
    for suffix in ("instruct", "hf", "chat", "base", "it", "v03", "v01"):
        plain = plain.removesuffix(suffix)
    return plain.replace("metallama", "llama")


_BY_PLAIN_NAME = {_plain(name): model for model in KNOWN_MODELS for name in (model.name, model.hub_name)}


def find_model(name_or_path: str) -> ModelShape:
    """A model by name (case, punctuation, owner and `-Instruct` do not matter), by config file, or by folder.

    Raises:
        ModelNotFoundError: neither a file nor a known name; the message names the nearest.
        InvalidConfigError, UnsupportedModelError: the file is no decoder's `config.json`.
    """
    path = Path(name_or_path)
    if path.exists():
        return read_shape(path)
    plain = _plain(name_or_path)
    if plain in _BY_PLAIN_NAME:
        return _BY_PLAIN_NAME[plain]
    near = difflib.get_close_matches(plain, _BY_PLAIN_NAME, n=1, cutoff=0.5)
    hint = f"did you mean {_BY_PLAIN_NAME[near[0]].name}? " if near else ""
    raise ModelNotFoundError(
        f"{name_or_path!r} is neither a config.json, nor a folder with one, nor a known model: {hint}"
        f"There are: {', '.join(model.name for model in KNOWN_MODELS)}"
    )
