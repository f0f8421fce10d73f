"""Tiny random checkpoints of many architectures, as oracles: small enough to build and run in milliseconds.

Default initialisation (0.02) makes tied models repeat one token, which proves nothing; 0.2 spreads the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

# What a type needs beside, or instead of, the common values; None drops a common one.
_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 4},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": {**_MOE, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**_MLA, "topk_method": "greedy", "head_dim": None},
    "deepseek_v3": {**_MLA, "head_dim": None},
    "cohere2": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8},
    "olmo3": {"sliding_window": 8},
    "gpt2": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None, "n_inner": 128},
    "gpt_bigcode": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None, "n_inner": 128},
    "gptj": {"head_dim": None, "num_key_value_heads": None, "rotary_dim": 8, "intermediate_size": None, "n_inner": 128},
    "codegen": {"head_dim": None, "num_key_value_heads": None, "rotary_dim": 8, "intermediate_size": None},
    "gpt_neo": {
        "head_dim": None,
        "num_key_value_heads": None,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "opt": {
        "head_dim": None,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
    },
    "bloom": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None},
    "mpt": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None, "max_seq_len": 512},
    "falcon": {"head_dim": None, "num_key_value_heads": None, "num_kv_heads": 2, "new_decoder_architecture": True},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A `PretrainedConfig` of `model_type`: vocabulary 256, hidden 64, 2 to 4 layers, 4 heads, 2 KV heads of 16."""
    values = {**_COMMON, **_SPECIAL.get(model_type, {}), **overrides}
    return AutoConfig.for_model(model_type, **{name: value for name, value in values.items() if value is not None})


def build_tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """The random `transformers` model in float32, in eval mode, with eager attention (the only one all types have).

    Norm weights and biases, which are born ones and zeros, get noise too: a loader that drops one must be seen.
    """
    config = tiny_config(model_type, **overrides)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("bias"):  # experts' biases share a matrix
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    finally:
        torch.set_rng_state(generator_state)
    return model.eval()


def save_tiny_model(model_type: str, folder: Path, seed: int = 0, **overrides: Any) -> Any:
    """Build the model, write its checkpoint to `folder` and return it."""
    model = build_tiny_model(model_type, seed, **overrides)
    model.save_pretrained(folder)
    return model


def random_token_ids(num_tokens: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids without the special ones (0, 1, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(3, vocab_size, (num_tokens,), generator=generator)]


def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Float32 logits `[num_tokens, vocab_size]` of one uncached pass through the `transformers` model."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float()


def greedy_reference(model: Any, token_ids: list[int], num_new_tokens: int) -> list[int]:
    """Tokens that `transformers.generate` appends greedily; never stops early."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(token_ids) :]]
