"""`--deterministic` through the whole engine: tokens and log-probabilities do not know the schedule."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from c_library import needs_c
from engines import engine_on, save_servable
from tiny_models import random_token_ids

from octavo import SamplingParams
from octavo.gateway.cli import build_parser, main
from octavo.gateway.config import make_config
from octavo.gateway.flags import engine_fields
from octavo.messages.errors import UnsupportedModelError

pytestmark = needs_c

PROMPTS = [random_token_ids(length, seed=length) for length in (21, 9, 33, 14, 5)]
PARAMS = [
    SamplingParams(temperature=1.3, top_p=0.95, seed=seed, max_tokens=24, logprobs=3, ignore_eos=True)
    for seed in range(len(PROMPTS))
]

# How the schedule treats the requests: what the engine is given.
WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked prefill": {"max_num_batched_tokens": 7, "max_num_seqs": 4},
    "other blocks": {"block_size": 16, "num_blocks": 64},
    "preempted": {"num_blocks": 26, "max_model_len": 64, "enable_prefix_caching": False},
    "one step in flight": {"pipeline_depth": 1},
}


async def run(folder: Path, dtype: str, one_by_one: bool = False, rounds: int = 1, **fields: Any) -> list[Any]:
    """Tokens and log-probabilities, as floats to the last bit, of each prompt."""
    async with engine_on(folder, dtype=dtype, deterministic=True, **fields) as engine:
        outputs: list[Any] = []
        for _ in range(rounds):
            pairs = zip(PROMPTS, PARAMS, strict=True)
            if one_by_one:
                outputs = [await engine.generate(prompt, params) for prompt, params in pairs]
            else:
                outputs = list(await asyncio.gather(*(engine.generate(prompt, params) for prompt, params in pairs)))
        if fields.get("num_blocks") == 26:
            assert engine.stats().num_preemptions > 0
        if rounds > 1:
            assert all(output.num_cached_tokens >= 4 for output in outputs)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_sampled_tokens_and_their_log_probabilities_are_the_same_bits_under_every_schedule(
    model_type: str, dtype: str, tmp_path: Path
) -> None:
    save_servable(model_type, tmp_path, seed=2)
    alone = asyncio.run(run(tmp_path, dtype, one_by_one=True, max_num_seqs=1))
    assert len({tuple(tokens) for tokens, _ in alone}) == len(PROMPTS)
    assert all(len(logprobs) == len(tokens) == 24 for tokens, logprobs in alone)
    for way, fields in WAYS.items():
        assert asyncio.run(run(tmp_path, dtype, **fields)) == alone, way
    assert asyncio.run(run(tmp_path, dtype, rounds=2)) == alone, "prefix hit"
    num_threads = torch.get_num_threads()
    try:
        assert asyncio.run(run(tmp_path, dtype, num_threads=2)) == alone, "two threads"
    finally:
        torch.set_num_threads(num_threads)


def test_a_model_without_native_implementation_is_refused_at_start(tmp_path: Path) -> None:
    save_servable("gpt2", tmp_path)

    async def start() -> None:
        async with engine_on(tmp_path, deterministic=True):
            raise AssertionError("it started")

    with pytest.raises(UnsupportedModelError, match=r"--deterministic.*served through transformers"):
        asyncio.run(start())


def test_the_flag_reaches_the_configuration_and_by_default_the_model_decides() -> None:
    for argv, expected in (
        (["serve"], None),
        (["serve", "--no-deterministic"], False),
        (["serve", "--deterministic"], True),
        (["run", "--deterministic"], True),
    ):
        assert make_config(engine_fields(build_parser().parse_args(argv))).deterministic is expected


def test_an_engine_says_whether_it_keeps_the_promise(tmp_path: Path) -> None:
    save_servable("llama", tmp_path)

    async def says(is_asked: bool) -> bool:
        async with engine_on(tmp_path, dtype="bfloat16", deterministic=is_asked) as engine:
            return engine.is_deterministic

    assert [asyncio.run(says(is_asked)) for is_asked in (True, False)] == [True, False]


def test_the_command_line_says_why_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_servable("gpt2", tmp_path)
    assert main(["run", str(tmp_path), "--deterministic", "--prompt", "hi"]) == 2
    assert "served through transformers" in capsys.readouterr().err
