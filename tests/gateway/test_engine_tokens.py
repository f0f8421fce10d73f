"""The whole engine against `transformers.generate`, in each of the ways a schedule can treat a request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engines import engine_on, save_servable
from paged_runner import assert_greedy_tokens_agree
from process_family import until
from tiny_architectures import ARCHITECTURES, TinyArchitecture
from tiny_models import greedy_reference, random_token_ids, reference_logits

from octavo import SamplingParams

NUM_NEW_TOKENS = 32
PROMPTS = [random_token_ids(21, seed=1), random_token_ids(9, seed=2), random_token_ids(13, seed=3)]

# GPT-OSS's own, but for the length of pre-training, which is passed here.
YARN = {
    **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"truncate": False, "original_max_position_embeddings": 16},
}

NATIVE = [
    TinyArchitecture("llama", "llama"),
    TinyArchitecture("mistral", "mistral", window=8),
    TinyArchitecture("qwen2", "qwen2"),
    TinyArchitecture("qwen3", "qwen3"),
    TinyArchitecture("smollm3", "smollm3"),
    TinyArchitecture("gemma2", "gemma2", window=8),
    TinyArchitecture("gemma3", "gemma3_text", window=8),
    TinyArchitecture("gpt_oss_yarn", "gpt_oss", {"rope_parameters": YARN}, window=8),
]

# How the schedule treats the requests: what the engine is given, and which prompts run at once.
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "chunked prefill": {"max_num_batched_tokens": 6, "max_num_seqs": 3},
    "prefix hit": {"rounds": 2},
    "preempted": {"num_blocks": 16, "max_model_len": 64, "enable_prefix_caching": False},
}


async def run(folder: Path, params: SamplingParams, way: str) -> list[list[int]]:
    """Output tokens of each prompt, after making sure that the schedule did what `way` says."""
    fields = dict(WAYS[way])
    rounds = fields.pop("rounds", 1)
    async with engine_on(folder, **fields) as engine:
        outputs: list[Any] = []
        for _ in range(rounds):
            outputs = list(await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS)))
        if way == "preempted":
            assert engine.stats().num_preemptions > 0
        if way == "prefix hit":
            assert all(output.num_cached_tokens >= 8 for output in outputs)
        async with asyncio.timeout(180):
            await until(lambda: engine.stats().kv_cache_usage == 0.0)  # all blocks come back
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("architecture", [*NATIVE, *ARCHITECTURES], ids=lambda architecture: architecture.name)
def test_greedy_tokens_are_those_of_generate_however_they_are_scheduled(
    architecture: TinyArchitecture, tmp_path: Path
) -> None:
    reference = save_servable(architecture.model_type, tmp_path, **architecture.overrides)
    expected = [greedy_reference(reference, prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    for way in WAYS:
        tokens = asyncio.run(run(tmp_path, params, way))
        assert [len(row) for row in tokens] == [NUM_NEW_TOKENS] * len(PROMPTS), way
        for prompt, ours, theirs in zip(PROMPTS, tokens, expected, strict=True):
            if ours != theirs:  # two logits may tie: then ours must be as good at every position
                assert_greedy_tokens_agree(reference_logits(reference, prompt + ours), prompt + ours, len(prompt))


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "gpt2"])
def test_seeded_sampling_does_not_depend_on_the_schedule(model_type: str, tmp_path: Path) -> None:
    save_servable(model_type, tmp_path)
    params = SamplingParams(
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        seed=1234,
        max_tokens=NUM_NEW_TOKENS,
        ignore_eos=True,
        presence_penalty=0.3,
        repetition_penalty=1.1,
    )
    alone = asyncio.run(run(tmp_path, params, "alone"))
    assert len({tuple(row) for row in alone}) == len(PROMPTS)
    for way in WAYS:
        assert asyncio.run(run(tmp_path, params, way)) == alone, way


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 16, 33, 64, 100, 256])
def test_every_block_size_gives_the_same_tokens(block_size: int, tmp_path: Path) -> None:
    reference = save_servable("qwen3", tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

    async def main() -> list[list[int]]:
        async with engine_on(tmp_path, block_size=block_size, num_blocks=-(-512 // block_size) + 3) as engine:
            outputs = await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS))
        return [output.outputs[0].token_ids for output in outputs]

    assert asyncio.run(main()) == [greedy_reference(reference, prompt, 12) for prompt in PROMPTS]
