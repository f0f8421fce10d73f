"""What a tensor is called in a GGUF file and in a checkpoint in the Hugging Face layout.

Source: `MODEL_TENSORS` and `TENSOR_NAMES` in gguf-py/gguf/constants.py of ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from typing import Final

_WHOLE: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_OF_ATTENTION: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Llama's second norm stands before the MLP; Gemma has one behind attention by the same name.
_OF_LLAMA: Final = {**_OF_ATTENTION, "ffn_norm": "post_attention_layernorm"}
_OF_GEMMA: Final = {
    **_OF_ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_OF_LAYERS: Final = {
    "llama": _OF_LLAMA,
    "qwen2": _OF_LLAMA,
    "qwen3": _OF_LLAMA,
    "gemma2": _OF_GEMMA,
    "gemma3": _OF_GEMMA,
}

ARCHITECTURES: Final = tuple(_OF_LAYERS)

# Tensors that are read with the configuration.
OF_CONFIG: Final = ("rope_freqs.weight",)

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")


def checkpoint_name(architecture: str, name: str) -> str:
    """The name in a checkpoint; a name that is not known stays as it is."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    layer, part, kind = match.groups()
    known = _OF_LAYERS[architecture].get(part)
    return name if known is None else f"model.layers.{layer}.{known}.{kind}"
