"""The workload is the published one, token for token."""

from __future__ import annotations

import random

from octavo.gateway.gpu_bench.requests_256 import lengths_of, requests_256


def test_the_published_seed_gives_the_published_numbers_of_tokens() -> None:
    lengths = lengths_of(requests_256())
    assert len(lengths) == 256
    assert sum(prompt for prompt, _ in lengths) == 142_827
    assert sum(output for _, output in lengths) == 133_966
    assert max(output for _, output in lengths) == 1024
    assert min(min(pair) for pair in lengths) >= 100


def test_prompts_are_drawn_as_the_published_script_draws_them() -> None:
    random.seed(0)
    prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    requests = requests_256()
    assert [request.token_ids for request in requests] == prompts
    assert [request.num_output_tokens for request in requests] == outputs


def test_a_smaller_one_has_other_bounds_and_no_ids_beyond_a_vocabulary() -> None:
    requests = requests_256(count=5, shortest=2, longest=9, max_token_id=31)
    assert len(requests) == 5
    assert all(2 <= length <= 9 for pair in lengths_of(requests) for length in pair)
    assert all(0 <= token <= 31 for request in requests for token in request.token_ids)
