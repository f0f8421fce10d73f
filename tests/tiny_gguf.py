"""Writing small GGUF files, from the specification and independently of the reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file

TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "IQ4_XS": 23, "BF16": 30}

# `general.file_type`: what most matrices are. OpenVINO refuses a file without it.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}


class U32(int):
    """A number to be written as uint32."""


class F32(float):
    """A number to be written as float32."""


class Raw(NamedTuple):
    """A tensor's bytes.

    Attributes:
        shape: as torch has it.
    """

    kind: str
    shape: tuple[int, ...]
    data: bytes


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    match item:
        case bool():
            return struct.pack("<I?", 7, item)
        case U32():
            return struct.pack("<II", 4, item)
        case F32():
            return struct.pack("<If", 6, item)
        case int():
            return struct.pack("<Iq", 11, item)
        case float():
            return struct.pack("<Id", 12, item)
        case str():
            return struct.pack("<I", 8) + text(item)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
        case [float(), *_]:
            return struct.pack("<IIQ", 9, 6, len(item)) + np.array(item, "<f4").tobytes()
        case list():
            return struct.pack("<IIQ", 9, 5, len(item)) + np.array(item, "<i4").tobytes()
    raise TypeError(type(item))


def gguf_parts(
    metadata: Mapping[str, Any], tensors: Mapping[str, Raw], *, version: int = 3, alignment: int = 32
) -> list[bytes]:
    """A file's bytes, a part for the header and two for each tensor, so that large ones are not copied."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(item) for key, item in metadata.items())
    offset = 0
    parts: list[bytes] = []
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", TYPE_NUMBERS[tensor.kind], offset)
        padding = bytes(-len(tensor.data) % alignment)
        parts += [tensor.data, padding]
        offset += len(tensor.data) + len(padding)
    return [head + bytes(-len(head) % alignment), *parts]


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, Raw], *, version: int = 3, alignment: int = 32
) -> bytes:
    return b"".join(gguf_parts(metadata, tensors, version=version, alignment=alignment))


def encoded(weight: np.ndarray, kind: str) -> Raw:
    """A float32 array in one of the simpler types."""
    weight = np.ascontiguousarray(weight, np.float32)
    match kind:
        case "F32":
            data = weight.tobytes()
        case "F16":
            data = weight.astype("<f2").tobytes()
        case "BF16":
            bits = weight.view(np.uint32)
            data = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
        case "Q8_0":
            blocks = weight.reshape(-1, 32)
            scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype("<f2")
            q = np.round(blocks / np.where(scale == 0, 1, scale).astype(np.float32)).clip(-127, 127).astype(np.int8)
            data = b"".join(d.tobytes() + row.tobytes() for d, row in zip(scale, q, strict=True))
        case _:
            raise ValueError(kind)
    return Raw(kind, weight.shape, data)


LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_LAYER_NAMES = {
    **LAYER_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    names = GEMMA_LAYER_NAMES if architecture.startswith("gemma") else LAYER_NAMES
    return f"blk.{layer}.{names[part]}.{kind}"


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As `LlamaModel.permute` of the converter has it."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def convert_checkpoint(
    folder: Path,
    out: Path,
    *,
    kind: str = "F32",
    kinds: Mapping[str, Raw] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, Raw] | None = None,
) -> Path:
    """A checkpoint's folder as a GGUF file, as the converters write it.

    Args:
        kind: type of the matrices; other tensors are F32.
        kinds: tensors to put in place, by their GGUF names.
        tokenizer: metadata of the tokenizer; None takes that of tokenizer.json.
        extra: further metadata.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config["model_type"], config["model_type"])
    rope = config["rope_parameters"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": folder.name,
        "general.quantization_version": U32(2),
        "general.file_type": U32(FILE_TYPES[kind]),
        f"{architecture}.context_length": U32(config["max_position_embeddings"]),
        f"{architecture}.embedding_length": U32(config["hidden_size"]),
        f"{architecture}.block_count": U32(config["num_hidden_layers"]),
        f"{architecture}.feed_forward_length": U32(config["intermediate_size"]),
        f"{architecture}.attention.head_count": U32(heads),
        f"{architecture}.attention.head_count_kv": U32(kv_heads),
        f"{architecture}.attention.layer_norm_rms_epsilon": F32(config["rms_norm_eps"]),
        f"{architecture}.attention.key_length": U32(head_dim),
        f"{architecture}.attention.value_length": U32(head_dim),
        **({f"{architecture}.rope.freq_base": F32(rope["rope_theta"])} if "rope_theta" in rope else {}),
        **(tokenizer_metadata(folder, vocab_size=config["vocab_size"]) if tokenizer is None else tokenizer),
        **(extra or {}),
    }
    tensors: dict[str, Raw] = dict(extra_tensors or {})
    for name, stored in load_file(folder / "model.safetensors").items():
        weight = stored.float().numpy()
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if architecture == "llama" and "q_proj" in name:
            weight = permuted(weight, heads)
        if architecture == "llama" and "k_proj" in name:
            weight = permuted(weight, kv_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + np.float32(1)
        gguf = gguf_name(name, architecture)
        tensors[gguf] = (kinds or {}).get(gguf) or encoded(weight, kind if weight.ndim == 2 else "F32")
    with out.open("wb") as file:
        file.writelines(gguf_parts(metadata, tensors))
    return out


def tokenizer_metadata(folder: Path, *, pre: str = "qwen2", vocab_size: int | None = None) -> dict[str, Any]:
    """Of a byte-level tokenizer.json, as the converters write it.

    Args:
        vocab_size: rows of the embedding. The others than the tokenizer's get names and are marked as unused: without
            them llama.cpp refuses the file, as it takes the size of the vocabulary from the tokens alone.
    """
    document = json.loads((folder / "tokenizer.json").read_text())
    named = json.loads((folder / "tokenizer_config.json").read_text())
    vocab: dict[str, int] = document["model"]["vocab"]
    added = {token["content"]: token for token in document["added_tokens"]}
    ids = {**vocab, **{content: token["id"] for content, token in added.items()}}
    tokens = sorted(ids, key=lambda token: ids[token])
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    types = [1 if token not in added else 3 if added[token]["special"] else 4 for token in tokens]
    num_unused = max(0, (vocab_size or 0) - len(tokens))
    tokens += [f"[PAD{token_id}]" for token_id in range(len(tokens), len(tokens) + num_unused)]
    types += [5] * num_unused
    template = folder / "chat_template.jinja"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in document["model"]["merges"]],
        **{
            f"tokenizer.ggml.{key}_token_id": U32(ids[named[name]])
            for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
            if named.get(name)
        },
        **({"tokenizer.chat_template": template.read_text()} if template.is_file() else {}),
    }
