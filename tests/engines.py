"""Engines on tiny random checkpoints, for tests of the whole graph."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from c_library import HAS_C
from tiny_models import VOCAB_SIZE, save_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from octavo import Engine
from octavo.messages.sampling import SamplingParams

TOLERANCE = 1e-4  # of a log-probability; 6e-6 was seen between one request alone and eight together
FIRST_SEED = 53
"""Of streams that are compared token by token without `--deterministic`, in float32. Batches of other sizes move the
edges between two tokens by up to 1e-6. With the seeds from this one on, up to 0.9 of temperature and for the prompts of
`tokens_of`, no draw falls within 1e-5 of an edge; with those from 0 on one falls within 5e-7."""


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose 256 tokens are the bytes, with a plain chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
    fast.save_pretrained(folder)


def save_servable(model_type: str, folder: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write checkpoint and tokenizer of a tiny model to `folder`; returns the `transformers` model."""
    model = save_tiny_model(model_type, folder, seed, **overrides)
    save_byte_tokenizer(folder)
    return model


def engine_on(folder: Path, **fields: Any) -> Engine:
    """An engine in float32 with a small pool, unless `fields` say otherwise."""
    return Engine(
        str(folder),
        **{"dtype": "float32", "num_blocks": 256, "block_size": 4, "max_model_len": 128, "num_threads": 1, **fields},
    )


def exact_engine_on(folder: Path, **fields: Any) -> Engine:
    """`engine_on` with arithmetic that does not know the rest of the batch, where it can be had.

    For whoever compares thousands of drawn tokens: without it, one in some tens of thousands would be another one.
    """
    return engine_on(folder, deterministic=HAS_C, **fields)


class Logprobs(list[float]):
    """Log-probabilities, equal to others within what float32 sums to in batches of other sizes.

    To round them would not do: there is always one near the edge between two rounded numbers.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Logprobs) and list(self) == pytest.approx(list(other), abs=TOLERANCE)

    def __ne__(self, other: object) -> bool:
        return not self == other


async def tokens_of(
    engine: Engine, index: int, on_token: Callable[[], None] = lambda: None, *, max_tokens: int = 60
) -> list[int]:
    """The tokens of a stream whose prompt and seed are its own: sampled, every other one greedy.

    Args:
        index: of the stream among several.
        on_token: called as tokens come.
    """
    temperature = 0.0 if index % 2 else 0.8
    params = SamplingParams(temperature=temperature, seed=FIRST_SEED + index, max_tokens=max_tokens, ignore_eos=True)
    tokens: list[int] = []
    async for delta in engine.stream(list(range(10 + index, 30 + index)), params):
        tokens += delta.token_ids
        on_token()
    return tokens


async def tokens_of_all(
    engine: Engine, num_streams: int, on_token: Callable[[], None] = lambda: None, *, max_tokens: int = 60
) -> list[list[int]]:
    """`tokens_of` so many streams at once."""
    streams = (tokens_of(engine, index, on_token, max_tokens=max_tokens) for index in range(num_streams))
    return await asyncio.gather(*streams)
