"""Which checkpoints the transformers path serves, told from their configuration before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from .errors import QuantizedModelError, UnsupportedModelError, WeightsError

_PAGED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_SPARSE_LAYER_TYPES = {
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
    "reference_sliding_attention",
}

# Rotary embeddings whose frequencies depend on how long the context is at the moment.
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")


def refuse_unsupported_config(config: Any, *, trust_remote_code: bool) -> None:
    """Raise `UnsupportedModelError` where a checkpoint's configuration says that it cannot be served.

    Args:
        config: `transformers.PretrainedConfig`.
    """
    kind = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        raise QuantizedModelError(
            f"the checkpoint is quantized ({_quantization_method(config)}) and quantized weights of '{kind}' cannot be "
            "loaded yet: use the checkpoint in bfloat16, float16 or float32"
        )
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"'{kind}' is an encoder-decoder: only decoders are served yet, cross attention is not paged"
        )
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None and not (trust_remote_code and getattr(config, "auto_map", None)):
        if getattr(config, "auto_map", None):
            raise UnsupportedModelError(
                f"'{kind}' needs code that comes with the checkpoint: read it, and allow it with --trust-remote-code"
            )
        raise UnsupportedModelError(
            f"'{kind}' has no decoder that generates text in transformers {transformers.__version__}"
        )
    refuse_recurrent(model_class, config)


def refuse_recurrent(model_class: Any, config: Any) -> None:
    """Raise `UnsupportedModelError` for models with other state than the K and V of each token."""
    kind = config.model_type
    layer_types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    sparse = sorted(layer_types & _SPARSE_LAYER_TYPES)
    if sparse:
        raise UnsupportedModelError(
            f"'{kind}' has layers of type {', '.join(sparse)}: their index's cache is not paged yet"
        )
    other = sorted(layer_types - _PAGED_LAYER_TYPES)
    if other or getattr(model_class, "_is_stateful", False):
        named = f" (layers of type {', '.join(other)})" if other else ""
        raise UnsupportedModelError(
            f"'{kind}' keeps recurrent state from token to token{named}: linear attention state is not paged yet"
        )


def refuse_unsafe_weights(path: str) -> None:
    """Raise `WeightsError` for a folder that has weights, but not as safetensors."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{path} has its weights in {pickled[0]}, a pickle that may run any code when it is read: save them as "
            "safetensors with model.save_pretrained(folder), or take a revision of the model that has model.safetensors"
        )
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:8])
    raise WeightsError(f"{path} has no *.safetensors files (files there: {found})")


def max_position_of(config: Any) -> int:
    """The longest context that the checkpoint was made for, in tokens."""
    text_config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    # Position by attention bias alone (Bloom): nothing in the model limits the context.
    return 2048


def rope_parameters_of(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings' settings, one entry for each kind of layer that has its own."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [entry for entry in parameters.values() if isinstance(entry, dict)]


def _quantization_method(config: Any) -> str:
    quantization = config.quantization_config
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unknown method"))
    return str(getattr(quantization, "quant_method", "unknown method"))
