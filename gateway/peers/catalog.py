"""The engines that the benchmark knows."""

from __future__ import annotations

import importlib
from typing import Any

from .adapter import Peer

OURS = "octavo"

# Name on the command line -> (module of this package, class, arguments).
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    OURS: ("ours", "Octavo", {}),
    "octavo-deterministic": ("ours", "Octavo", {"deterministic": True}),
    "octavo-not-deterministic": ("ours", "Octavo", {"deterministic": False}),
    "transformers-sequential": ("transformers_generate", "TransformersGenerate", {"batch_size": 1}),
    "transformers-static": ("transformers_generate", "TransformersGenerate", {"batch_size": None}),
    "transformers-continuous": ("transformers_batching", "TransformersBatching", {}),
    "llama.cpp": ("llamacpp", "LlamaCpp", {}),
    "openvino-genai": ("openvino_batching", "OpenVINOBatching", {}),
    "vllm": ("vllm_offline", "VLLMOffline", {}),
    "mini-sglang": ("mini_sglang", "MiniSGLang", {}),
    "nano-vllm": ("nano_vllm", "NanoVLLM", {}),
}

GPU_PEERS = ("mini-sglang", "nano-vllm", "vllm", "transformers-continuous")
"""Measured beside octavo on a GPU, where they can be imported."""

_GPU_ONLY = ("mini-sglang", "nano-vllm")

PEERS = tuple(name for name in ADAPTERS if not name.startswith(OURS) and name not in _GPU_ONLY)
"""Measured on a CPU when none is named."""


def make_peer(name: str) -> Peer:
    """The adapter of that name, without anything loaded. `module:Class` names one of your own."""
    if name in ADAPTERS:
        module_name, class_name, arguments = ADAPTERS[name]
        found = importlib.import_module(f".{module_name}", __package__)
    else:
        module_name, _, class_name = name.partition(":")
        arguments = {}
        found = importlib.import_module(module_name)
    peer: Peer = getattr(found, class_name)(**arguments)
    return peer
