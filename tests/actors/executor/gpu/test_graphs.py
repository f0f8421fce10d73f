from __future__ import annotations

from collections.abc import Callable, Iterator
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
        self.can_end = True
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
            try:
                yield
            except RuntimeError:
                if not self.can_end:
                    raise RuntimeError("the capture was invalidated")  # noqa: B904  # as torch's, which ends it so
                raise
            log.append("end")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the default")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append(("stream", stream)))


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


def without_memory_for(*sizes: int) -> Callable[[int], None]:
    """Decodes steps, but of these sizes."""

    def decode(size: int) -> None:
        if size in sizes:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return decode


def test_sizes_that_no_memory_is_left_for_are_launched_and_the_others_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    decoded: list[int] = []
    works = without_memory_for(8, 4)

    def decode(size: int) -> None:
        works(size)
        decoded.append(size)

    graphs = Graphs(decode, (1, 4, 8, 2), CUDA)
    graphs.capture()
    assert graphs.num_captured == 2
    assert decoded == [2, 2, 1, 1]
    # The first graph that there is gives the pool.
    assert [entry for entry in cuda.log if entry[0] == "begin"] == [("begin", 0, None), ("begin", 1, "the pool")]
    works = without_memory_for()
    graphs.run(8)
    assert decoded[-1] == 8
    graphs.run(2)
    assert cuda.log[-1] == ("replay", 0)


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_runs_out_of_memory_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.can_end = ends
    calls: list[int] = []

    def decode(size: int) -> None:
        calls.append(size)
        if calls.count(size) == 2 and size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = Graphs(decode, (1, 4), CUDA)
    graphs.capture()
    assert graphs.num_captured == 1
    assert [entry for entry in cuda.log if entry[0] == "stream"] == [("stream", "the default")]


def test_members_of_a_group_capture_the_same_or_none_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        Graphs(without_memory_for(4), (1, 4), CUDA, must_fit=True).capture()


def test_another_error_of_a_capture_is_nobody_s_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)

    def decode(_size: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        Graphs(decode, (1,), CUDA).capture()
