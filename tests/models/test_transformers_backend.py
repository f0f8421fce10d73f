"""Any decoder of transformers, served from paged KV, gives the tokens that transformers.generate gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.models.errors import ModelLoadError
from octavo.models.transformers_attention import UnsupportedAttentionError, sliding_window_of
from octavo.models.transformers_backend import TransformersCausalLM, load_transformers_model, page_model
from paged_runner import PagedRunner, assert_greedy_tokens_agree, run_paged
from tiny_architectures import ARCHITECTURES, TinyArchitecture
from tiny_models import build_tiny_model, greedy_reference, random_token_ids, reference_logits, save_tiny_model, tiny_config
from transformers import AutoConfig
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

NUM_NEW_TOKENS = 32
BLOCK_SIZE = 4
PROMPTS = [random_token_ids(21, seed=1), random_token_ids(9, seed=2), random_token_ids(13, seed=3)]


class Runner(PagedRunner):
    """A `PagedRunner` whose rows may begin with blocks of another row."""

    def share(self, source: int, target: int, num_tokens: int) -> None:
        """Let `target` begin with the first `num_tokens` of `source`, in the same blocks."""
        num_blocks = num_tokens // self.block_size
        assert num_blocks * self.block_size == num_tokens <= self._lengths[source]
        self._blocks[target][:num_blocks] = self._blocks[source][:num_blocks]
        self._lengths[target] = num_tokens


def load(folder: Path, **options: Any) -> TransformersCausalLM:
    options = {
        "dtype": torch.float32,
        "trust_remote_code": False,
        "device": torch.device("cpu"),
        "config": AutoConfig.from_pretrained(folder),
        **options,
    }
    model = load_transformers_model(str(folder), **options)
    assert isinstance(model, TransformersCausalLM)
    return model


def runner_of(model: TransformersCausalLM, num_rows: int) -> Runner:
    return Runner(model, num_rows=num_rows, max_len=64, block_size=BLOCK_SIZE)


def decode(runner: Runner, logits: dict[int, torch.Tensor], prompts: dict[int, list[int]]) -> dict[int, list[int]]:
    """Greedy decode of all rows together, from the logits of their prompts' last tokens to `NUM_NEW_TOKENS`."""
    tokens = {row: [*prompt, int(logits[row][-1].argmax())] for row, prompt in prompts.items()}
    while True:
        open_rows = {row: [t[-1]] for row, t in tokens.items() if len(t) < len(prompts[row]) + NUM_NEW_TOKENS}
        if not open_rows:
            return tokens
        for row, row_logits in runner.step(open_rows).items():
            tokens[row].append(int(row_logits[-1].argmax()))


def generate_alone(model: TransformersCausalLM, prompt: list[int]) -> list[int]:
    runner = runner_of(model, 1)
    return decode(runner, runner.step({0: prompt}), {0: prompt})[0]


def generate_in_chunks(model: TransformersCausalLM, prompt: list[int], chunk: int) -> list[int]:
    runner, logits = runner_of(model, 1), {}
    for start in range(0, len(prompt), chunk):
        logits = runner.step({0: prompt[start : start + chunk]})
    return decode(runner, logits, {0: prompt})[0]


def generate_batched(model: TransformersCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """All together and out of step: the last prompt is prefilled while the others decode already."""
    runner = runner_of(model, len(prompts))
    late = len(prompts) - 1
    logits = runner.step({row: prompts[row] for row in range(late)})
    started = {row: [*prompts[row], int(logits[row][-1].argmax())] for row in range(late)}
    logits = runner.step({late: prompts[late], **{row: [tokens[-1]] for row, tokens in started.items()}})
    out = decode(runner, logits, {**started, late: prompts[late]})
    return [out[row][: len(prompt) + NUM_NEW_TOKENS] for row, prompt in enumerate(prompts)]


def generate_after_prefix_hit(model: TransformersCausalLM, prompt: list[int], others_end: list[int]) -> list[list[int]]:
    """Row 0 computes the prompt; row 1 reuses its first 16 tokens, row 2 too but goes on otherwise."""
    runner = runner_of(model, 3)
    other = prompt[:16] + others_end
    logits = runner.step({0: prompt})
    for row in (1, 2):
        runner.share(0, row, 16)
    logits |= runner.step({1: prompt[16:], 2: other[16:]})
    out = decode(runner, logits, {0: prompt, 1: prompt, 2: other})
    return [out[row] for row in range(3)]


def assert_tokens_are_those_of(reference: Any, tokens: list[int], prompt: list[int]) -> None:
    """Equal to `generate`, but for ties: from the first tie on, each token must be best by the reference's logits."""
    assert len(tokens) == len(prompt) + NUM_NEW_TOKENS
    if tokens[len(prompt) :] != greedy_reference(reference, prompt, NUM_NEW_TOKENS):
        assert_greedy_tokens_agree(reference_logits(reference, tokens), tokens, len(prompt))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_greedy_tokens_are_those_of_generate_alone_batched_chunked_and_after_a_prefix_hit(
    architecture: TinyArchitecture, tmp_path: Path
) -> None:
    reference = save_tiny_model(architecture.model_type, tmp_path, **architecture.overrides)
    model = load(tmp_path)

    assert model.attention == architecture.attention
    num_layers = reference.config.num_hidden_layers
    if architecture.model_type != "diffllama":  # calls attention twice a layer
        assert len(model.kv_cache_specs) == (architecture.num_caches or num_layers)

    prompt = PROMPTS[0]
    alone = generate_alone(model, prompt)
    assert len(set(alone[len(prompt) :])) >= 3, "a model that repeats itself proves nothing"
    assert_tokens_are_those_of(reference, alone, prompt)
    assert_tokens_are_those_of(reference, generate_in_chunks(model, prompt, 5), prompt)
    for tokens, batched_prompt in zip(generate_batched(model, PROMPTS), PROMPTS, strict=True):
        assert_tokens_are_those_of(reference, tokens, batched_prompt)
    first, hit, other = generate_after_prefix_hit(model, prompt, PROMPTS[1])
    assert_tokens_are_those_of(reference, first, prompt)
    assert_tokens_are_those_of(reference, hit, prompt)
    assert_tokens_are_those_of(reference, other, prompt[:16] + PROMPTS[1])
