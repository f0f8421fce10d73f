"""The `transformers` peers, for real, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import build_tiny_model, greedy_reference, random_token_ids

from octavo.gateway.peers.adapter import LoadOptions, Peer, Request, check_outputs
from octavo.gateway.peers.catalog import make_peer

REQUESTS = [
    Request(random_token_ids(21, seed=1), 12),
    Request(random_token_ids(5, seed=2), 20),
    Request(random_token_ids(9, seed=3), 1),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A folder and what the model answers; it would stop early if it were let."""
    folder = tmp_path_factory.mktemp("peer")
    reference = build_tiny_model("llama", 1)
    expected = [greedy_reference(reference, one.token_ids, one.num_output_tokens) for one in REQUESTS]
    reference.config.eos_token_id = reference.generation_config.eos_token_id = expected[1][3]
    reference.save_pretrained(folder)
    return folder, expected


@pytest.mark.parametrize("name", ["transformers-sequential", "transformers-static", "transformers-continuous"])
def test_each_gives_the_greedy_tokens_of_every_request_whatever_its_length(
    name: str, model: tuple[Path, list[list[int]]]
) -> None:
    folder, expected = model
    peer: Peer = make_peer(name)
    options = LoadOptions(folder=str(folder), dtype="float32", num_threads=1, max_total_tokens=512)
    assert peer.is_available(options) == ""
    assert "attention" in peer.load(options)
    assert "transformers" in peer.versions()
    for _ in range(2):
        outputs = peer.run(REQUESTS)
        check_outputs(REQUESTS, outputs)
        assert outputs == expected
