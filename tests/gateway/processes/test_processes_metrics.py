"""`/metrics` and `/load` of `octavo serve --gateways 2` with real processes: one account, whichever edge is asked."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from engines import save_servable
from prometheus_client.parser import text_string_to_metric_families
from served_processes import Client, Served, wait_until

NUM_STREAMS = 12
NUM_SCRAPES = 50
Counts = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder, max_position_embeddings=8192)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with Served(model, "--gateways", "2", "--max-model-len", "4096") as server:
        server.serving_edge("edge 1")
        yield server


def read(url: str) -> bytes:
    """Over a connection of its own, which the system gives to any of the edges."""
    with urlopen(url, timeout=300) as response:
        return bytes(response.read())


def counts_of_all(url: str) -> Counts:
    """What only grows, but for what is a process's; asked for until an edge knows of all edges."""
    for _ in range(1000):
        counts: Counts = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(read(f"{url}/metrics").decode())
            for sample in family.samples
            if family.type in ("counter", "histogram") and not sample.name.startswith(("process_", "python_"))
        }
        if not any(name == "edge" for _, labels in counts for name, _ in labels):
            return counts
    raise AssertionError("edge 0 never answers in time")


def num_answered(counts: Counts) -> float:
    found = [
        value
        for (name, labels), value in counts.items()
        if name == "http_requests_total" and ("handler", "/v1/completions") in labels
    ]
    return sum(found)


def num_ended(counts: Counts) -> float:
    return sum(value for (name, _), value in counts.items() if name == "vllm:request_success_total")


def check_none_fell(before: Counts, after: Counts) -> None:
    fell = {key: (value, after.get(key)) for key, value in before.items() if after.get(key, -1.0) < value}
    assert not fell


async def stream_and_scrape(server: Served, max_tokens: int, num_scrapes: int) -> list[Counts]:
    """Have streams run, and look meanwhile."""
    streaming = [asyncio.create_task(Client(index, max_tokens).run(server.url)) for index in range(NUM_STREAMS)]
    found = [await asyncio.to_thread(counts_of_all, server.url) for _ in range(num_scrapes)]
    for client in await asyncio.gather(*streaming):
        assert (client.error, client.finish_reason) == ("", "length")
    return found


def restarts(counts: Counts) -> dict[str, float]:
    return {
        dict(labels)["actor"]: value
        for (name, labels), value in counts.items()
        if name == "octavo:actor_restarts_total"
    }


def test_counters_are_of_all_edges_whichever_is_asked_and_outlive_an_edge(server: Served) -> None:
    edge = server.serving_edge("edge 1")
    first = counts_of_all(server.url)
    found = asyncio.run(stream_and_scrape(server, 400, NUM_SCRAPES))
    for before, after in itertools.pairwise(found):
        check_none_fell(before, after)
    num_sent = num_answered(first) + NUM_STREAMS
    wait_until(lambda: num_answered(counts_of_all(server.url)) == num_sent)
    last = counts_of_all(server.url)
    assert num_ended(last) == num_sent

    edge.kill()
    server.serving_edge("edge 1", other_than=edge.pid)
    after = counts_of_all(server.url)
    check_none_fell(last, after)
    assert num_answered(after) == num_ended(after) == num_sent
    wait_until(lambda: restarts(counts_of_all(server.url))["edge"] == restarts(first)["edge"] + 1)

    asyncio.run(stream_and_scrape(server, 20, 1))
    num_sent += NUM_STREAMS
    wait_until(lambda: num_answered(counts_of_all(server.url)) == num_sent)
    assert num_ended(counts_of_all(server.url)) == num_sent


def test_the_load_is_of_all_edges_whichever_is_asked(server: Served) -> None:
    async def main() -> None:
        streaming = [asyncio.create_task(Client(index, 1500).run(server.url)) for index in range(NUM_STREAMS)]
        loads = [0]
        while loads[-1] < NUM_STREAMS and not any(task.done() for task in streaming):
            loads.append(json.loads(await asyncio.to_thread(read, f"{server.url}/load"))["server_load"])
        assert max(loads) == NUM_STREAMS
        assert [client.error for client in await asyncio.gather(*streaming)] == [""] * NUM_STREAMS

    asyncio.run(main())
    wait_until(lambda: json.loads(read(f"{server.url}/load"))["server_load"] == 0)
