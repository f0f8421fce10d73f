from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from octavo.actors.executor.gpu.graphs import Graphs
from octavo.actors.executor.gpu.mixed_sizes import MixedSize

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_step_is_padded_to_the_next_size() -> None:
    graphs = Graphs(lambda _: None, (8, 1, 4, 2, 4), CPU)
    assert [graphs.size_for(count) for count in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, None]
    assert Graphs(lambda _: None, (), CPU).size_for(1) is None


def test_on_a_cpu_a_size_is_a_call() -> None:
    calls: list[int] = []
    graphs = Graphs(calls.append, (1, 4), CPU)
    graphs.capture()
    graphs.run(4)
    assert calls == [4, 1, 4]
    assert graphs.num_captured == 2


class FakeCuda:
    """What `Graphs` asks of torch.cuda, written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[Any] = []
        log, counter = self.log, iter(range(100))

        class FakeGraph:
            def __init__(self) -> None:
                self.number = next(counter)

            def pool(self) -> str:
                return "the pool" if self.number == 0 else f"pool of {self.number}"

            def replay(self) -> None:
                log.append(("replay", self.number))

        @contextmanager
        def graph(graph: FakeGraph, pool: object, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            log.append(("begin", graph.number, pool))
            yield
            log.append("end")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))


def test_sizes_are_captured_from_the_largest_in_one_pool_each_after_a_run_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    graphs = Graphs(lambda size: cuda.log.append(("decode", size)), (1, 2, 8), CUDA)
    graphs.run(8)  # while nothing is captured: launch by launch
    assert cuda.log == [("decode", 8)]
    cuda.log.clear()
    graphs.capture()
    expected: list[Any] = []
    for number, (size, pool) in enumerate(((8, None), (2, "the pool"), (1, "the pool"))):
        expected += [("decode", size), "synchronize", ("begin", number, pool), ("decode", size), "end"]
        expected += [("replay", number)]
    assert cuda.log == expected
    assert graphs.num_captured == 3
    cuda.log.clear()
    graphs.run(2)
    assert cuda.log == [("replay", 1)]


def test_steps_with_chunks_share_the_pool_and_come_in_the_order_of_their_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    sizes = (MixedSize(4, 64), MixedSize(1, 2))
    graphs = Graphs(
        lambda size: cuda.log.append(("decode", size)),
        (1, 8),
        CUDA,
        mixed=lambda size: cuda.log.append(("mixed", size)),
        mixed_sizes=sizes,
    )
    assert graphs.size_for(3) == 8
    graphs.capture()
    worked = [entry for entry in cuda.log if entry[0] in {"decode", "mixed"}]
    in_order = [("mixed", sizes[0]), ("decode", 8), ("mixed", sizes[1]), ("decode", 1)]
    assert worked == [entry for entry in in_order for _ in range(2)]  # once before, and once in the capture
    assert [entry[2] for entry in cuda.log if entry[0] == "begin"] == [None, "the pool", "the pool", "the pool"]
    assert graphs.num_captured == 4
    cuda.log.clear()
    graphs.run(sizes[1])
    graphs.run(8)
    assert cuda.log == [("replay", 2), ("replay", 1)]
