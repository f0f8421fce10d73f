"""The workload of 256 requests by which small engines are compared: random ids, all at once, outputs of fixed lengths.

Source: the offline benchmark of nano-vllm, which mini-sglang took over: `seed(0)`, 256 prompts of 100 to 1,024 ids from
0 to 10,000, outputs of 100 to 1,024 tokens, temperature 0.6, the end token ignored. 142,827 tokens in, 133,966 out.
"""

from __future__ import annotations

import random

import msgspec

TEMPERATURE = 0.6
MAX_MODEL_LEN = 4096


class GeneratedRequest(msgspec.Struct, frozen=True):
    """One prompt and how many tokens are to come of it."""

    token_ids: list[int]
    num_output_tokens: int


def requests_256(
    *, seed: int = 0, count: int = 256, shortest: int = 100, longest: int = 1024, max_token_id: int = 10_000
) -> list[GeneratedRequest]:
    """The requests, drawn in the order of the published script: every prompt's length and ids, then every output."""
    chance = random.Random(seed)  # noqa: S311  # a workload, not a secret
    prompts = [
        [chance.randint(0, max_token_id) for _ in range(chance.randint(shortest, longest))] for _ in range(count)
    ]
    outputs = [chance.randint(shortest, longest) for _ in range(count)]
    return [GeneratedRequest(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def lengths_of(requests: list[GeneratedRequest]) -> list[tuple[int, int]]:
    """`(prompt, output)` tokens of each."""
    return [(len(request.token_ids), request.num_output_tokens) for request in requests]
