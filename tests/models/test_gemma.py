"""Gemma 2 and 3 against `transformers`, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from paged_runner import assert_greedy_tokens_agree, greedy_paged, run_paged
from tiny_models import random_token_ids, reference_logits, save_tiny_model

from octavo.models.gemma import GemmaForCausalLM
from octavo.models.registry import load_model

NUM_PROMPT, NUM_DECODES = 40, 16

_LONG_GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {}),
    "gemma2-tied": ("gemma2", {"tie_word_embeddings": True}),
    "gemma2-sharp-softcaps": ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}),
    "gemma2-no-softcaps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-scalar-and-bias": ("gemma2", {"query_pre_attn_scalar": 40, "attention_bias": True}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-tied": ("gemma3_text", {"tie_word_embeddings": True}),
    "gemma3-pattern": ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 2}),
    "gemma3-angles-by-layer-type": ("gemma3_text", {"rope_parameters": _LONG_GLOBAL}),
    "gemma3-final-softcap": ("gemma3_text", {"final_logit_softcapping": 2.0, "attention_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_stepping_equals_transformers(case: str, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    reference = save_tiny_model(model_type, tmp_path, seed=2, **overrides)
    model = load_model(tmp_path, dtype="float32", model_impl="native")
    assert isinstance(model, GemmaForCausalLM)
    prompt = random_token_ids(NUM_PROMPT, seed=2)
    tokens = prompt + greedy_paged(model, prompt, NUM_DECODES, chunks=(7, 16, 17), block_size=5)
    expected = reference_logits(reference, tokens)
    assert_greedy_tokens_agree(expected, tokens, NUM_PROMPT)
    # Tied and random, Gemma repeats its last token, whose scaled embedding outweighs all else: the logits still tell.
    assert len(set(tokens[NUM_PROMPT:])) > 3 or overrides.get("tie_word_embeddings")
    for chunks, block_size in ((None, 16), ((7, 16, 17), 5), ((NUM_PROMPT,), 1)):
        torch.testing.assert_close(run_paged(model, tokens, chunks, block_size), expected, atol=1e-4, rtol=1e-4)
