"""The matrix of architectures that the transformers path is tested with: one tiny random checkpoint each.

Prompts of the tests are longer than every sliding window and attention chunk here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Attention = Literal["paged attention", "paged cache"]


@dataclass(frozen=True, slots=True)
class TinyArchitecture:
    """One row of the matrix.

    Attributes:
        name: of the test.
        model_type: of `tiny_models.tiny_config`.
        overrides: beside what `tiny_config` sets for the type.
        attention: the way of `models/transformers_backend.py` that it is expected to go.
        num_caches: layers that keep KV, where it is not `num_hidden_layers`.
        window: sliding window of some layer, 0 if there is none.
    """

    name: str
    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    attention: Attention = "paged attention"
    num_caches: int | None = None
    window: int = 0


def _fast(name: str, model_type: str | None = None, **overrides: Any) -> TinyArchitecture:
    return TinyArchitecture(name, model_type or name, overrides)


def _windowed(name: str, model_type: str | None = None, **overrides: Any) -> TinyArchitecture:
    return TinyArchitecture(name, model_type or name, overrides, window=8)


def _own_attention(name: str, model_type: str | None = None, **overrides: Any) -> TinyArchitecture:
    return TinyArchitecture(name, model_type or name, overrides, attention="paged cache")


_ALTERNATING = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.125,
}

ARCHITECTURES = (
    # Plain, with head sizes, head counts and tying that others are not tested with.
    _fast("llama"),
    _fast("llama_head_dim_24", "llama", head_dim=24),
    _fast("llama_multi_query_tied", "llama", num_key_value_heads=1, tie_word_embeddings=True),
    _fast("llama_llama3_rope", "llama", rope_parameters=_LLAMA3),
    _fast("llama_attention_bias", "llama", attention_bias=True, mlp_bias=True),
    _fast("arcee"),
    _fast("apertus"),
    _fast("bitnet"),
    _fast("cwm", layer_types=["full_attention", "full_attention"]),
    _windowed("cwm_windows", "cwm", layer_types=_ALTERNATING, sliding_window=8),
    _fast("diffllama", num_hidden_layers=2),
    _fast("ernie4_5"),
    _fast("helium"),
    _fast("hunyuan_v1_dense"),
    _fast("jais2"),
    _fast("nemotron"),
    _fast("olmo"),
    _fast("olmo_clipped", "olmo", clip_qkv=0.5),
    _fast("olmo2"),
    _windowed("olmo3", layer_types=_ALTERNATING),
    _windowed("mistral"),
    _windowed("ministral", layer_types=_ALTERNATING, sliding_window=8),
    _fast("qwen2"),
    _windowed(
        "qwen2_windows", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=3
    ),
    _fast("qwen3"),
    _fast("qwen3_head_dim_40", "qwen3", head_dim=40),
    _fast("seed_oss"),
    _fast("smollm3"),
    _windowed("starcoder2", sliding_window=8),
    _fast("starcoder2_tied", "starcoder2", tie_word_embeddings=True),
    _windowed("exaone4", layer_types=_ALTERNATING),
    # Soft caps, scaled embeddings, norms around.
    _fast("gemma"),
    _windowed("gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    _windowed("gemma3_text"),
    _windowed("vaultgemma", sliding_window=8, layer_types=_ALTERNATING, query_pre_attn_scalar=16),
    _fast("granite", **_GRANITE),
    _fast("glm"),
    _fast("glm4"),
    # KV shared between layers.
    TinyArchitecture(
        "gemma3n_text",
        "gemma3n_text",
        {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": _ALTERNATING * 3,
            "sliding_window": 8,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
        },
        num_caches=4,
        window=8,
    ),
    TinyArchitecture(
        "gemma4_text",
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": _ALTERNATING * 3,
            "sliding_window": 8,
            "global_head_dim": 32,
        },
        num_caches=4,
        window=8,
    ),
    # Parallel residual, partial rotary, learned positions.
    _fast("cohere", logit_scale=1.5, use_qk_norm=True),
    _windowed("cohere2", logit_scale=1.5, layer_types=_ALTERNATING),
    _fast("gpt_neox", rotary_pct=0.25),
    _fast("gpt2"),
    _fast("gpt2_scaled", "gpt2", scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    _fast("gpt_bigcode", multi_query=True),
    _fast("gpt_bigcode_multi_head", "gpt_bigcode", multi_query=False),
    _fast("opt", init_std=0.2),
    _fast("opt_post_norm", "opt", init_std=0.2, do_layer_norm_before=False, word_embed_proj_dim=32),
    _fast("biogpt"),
    _fast("ctrl"),
    _fast("persimmon", qk_layernorm=True, partial_rotary_factor=0.5),
    _fast("phi", partial_rotary_factor=0.5, qk_layernorm=True),
    _windowed("phi3", sliding_window=8),
    _fast(
        "phi3_partial_rotary",
        "phi3",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    _fast("stablelm", use_qkv_bias=True, use_parallel_residual=True),
    # Multi-head latent attention: K and V of different widths.
    _fast("deepseek_v2"),
    _fast("deepseek_v3"),
    _fast("deepseek_v3_yarn", "deepseek_v3", rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    # Mixtures of experts.
    _windowed("mixtral"),
    _windowed("gpt_oss"),
    _fast("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    _fast(
        "dbrx",
        hidden_size=None,  # its second name, d_model, is the one that the experts' width follows
        d_model=64,
        num_key_value_heads=None,
        attn_config={"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    _fast("dots1"),
    _fast("ernie4_5_moe", moe_layer_start_index=0),
    _fast("flex_olmo"),
    _fast("glm4_moe"),
    _fast("granitemoe", **_GRANITE),
    _fast("granitemoeshared", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32, **_GRANITE),
    _fast("hunyuan_v1_moe", num_experts=4, moe_topk=2),
    _fast("jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=16),
    _fast("minimax_m2"),
    _fast("olmoe"),
    _fast("phimoe"),
    _fast("qwen2_moe"),
    _fast("qwen3_moe"),
    _fast("solar_open", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1),
    # Attention of their own: position biases, local windows, or code from before the attention interface.
    _own_attention("bloom"),
    _own_attention("codegen"),
    _own_attention("doge", keep_window_size=2048),
    _own_attention("falcon"),
    _own_attention("falcon_alibi", "falcon", alibi=True, new_decoder_architecture=False, multi_query=True),
    _own_attention("falcon_multi_query", "falcon", new_decoder_architecture=False, multi_query=True),
    _own_attention("gpt_neo"),
    _own_attention("gpt_neox_japanese"),
    _own_attention("gptj"),
    _own_attention("llama4_text", num_local_experts=4, floor_scale=4, no_rope_layer_interval=2),
    _own_attention(
        "llama4_text_chunked",
        "llama4_text",
        num_local_experts=4,
        attn_temperature_tuning=False,
        attention_chunk_size=8,
        no_rope_layer_interval=2,
        num_hidden_layers=4,
    ),
    _own_attention("mpt"),
    _own_attention("trocr"),
    _own_attention("xglm", init_std=0.2),
)
