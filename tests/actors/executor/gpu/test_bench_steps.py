"""The benchmark of steps, on a CPU with a tiny model: its messages and its books."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model

from octavo.actors.executor.gpu.bench_steps import TimedStream, _beside_prompts, _decode_steps, rows
from octavo.actors.executor.gpu.graphs import Graphs

CPU = torch.device("cpu")


def test_it_tells_of_every_batch_with_graphs_and_without_and_of_prompts(tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path)
    found = list(
        rows(
            torch.device("cpu"),
            model=str(tmp_path),
            context=20,
            batches=(1, 3),
            mixed=((2, 8),),
            prompts=(8,),
            num_steps=3,
            rounds=1,
            max_num_batched_tokens=64,
            without_graphs=(3,),
            num_threads=1,
        )
    )
    assert [(row["kernel"], row["shape"]) for row in found] == [
        ("start", "3 graphs"),
        ("decode step", "B=1 ctx=20 graph"),
        ("decode step", "B=3 ctx=20 graph"),
        ("mixed step", "B=2 ctx=20 + 8 of a prompt graph"),
        ("prefill step", "1 x 8"),
        ("decode step", "B=3 ctx=20 no graph"),
    ]
    assert all(row["ms"] > 0 for row in found)
    assert all(0.0 <= row["idle"] <= 1.0 for row in found if "idle" in row)
    assert found[1]["context"] == 20
    assert (found[3]["batch"], found[3]["num_tokens"]) == (2, 8)


def test_without_graphs_there_still_are_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model("qwen3", tmp_path)

    def broken(self: Graphs) -> None:
        if self.sizes:
            raise RuntimeError("operation not permitted when stream is capturing")
        capture(self)

    capture = Graphs.capture
    monkeypatch.setattr(Graphs, "capture", broken)
    small: dict[str, Any] = {"context": 20, "batches": (1,), "mixed": (), "prompts": (8,), "num_steps": 3, "rounds": 1}
    found = list(rows(CPU, model=str(tmp_path), max_num_batched_tokens=64, without_graphs=(1,), num_threads=1, **small))
    assert [row["kernel"] for row in found] == ["steps", "prefill step", "decode step"]
    assert found[0]["note"].startswith("failed: RuntimeError: operation not permitted")


def test_beside_decodes_each_step_computes_a_prompt_of_its_own_and_drops_the_last_one() -> None:
    decodes = list(_decode_steps(2, 30, 5, 16, vocab_size=50))
    steps = list(_beside_prompts(iter(decodes), 20, 16, 50, first_block=9))
    assert len(steps) == len(decodes) == 6
    tables: list[tuple[int, ...]] = []
    dropped: list[int] = []
    for step, decode in zip(steps[:-1], decodes[:-1], strict=True):
        assert step.num_tokens == (*decode.num_tokens, 20)
        new = step.request_ids[-1]
        assert step.start[-1].request_id == new and step.start[-1].num_computed_tokens == 0
        assert len(step.block_tables) == len(step.start)
        request_id, blocks = step.append_blocks[-1]
        assert request_id == new
        tables.append(blocks)
        assert step.drop == tuple(dropped[-1:])
        dropped.append(new)
    assert len(set(dropped)) == 5 and not {*dropped} & {*decodes[0].request_ids}
    assert all(min(blocks) >= 9 and len(blocks) == 2 for blocks in tables)
    assert all(not {*one} & {*other} for one, other in itertools.pairwise(tables))
    assert steps[-1].drop == (*decodes[-1].drop, dropped[-1])


def test_its_steps_take_a_block_when_the_last_is_full_and_never_share_one() -> None:
    steps = list(_decode_steps(2, 30, 40, 16, vocab_size=50))
    assert len(steps) == 41
    tables = {start.request_id: list(table) for start, table in zip(steps[0].start, steps[0].block_tables, strict=True)}
    assert all(start.num_computed_tokens == 29 for start in steps[0].start)
    for number, step in enumerate(steps[:-1]):
        for request_id, blocks in step.append_blocks:
            tables[request_id] += blocks
        num_tokens = 30 + number
        assert all(len(table) == -(-num_tokens // 16) for table in tables.values())
    held = [block for table in tables.values() for block in table]
    assert len(set(held)) == len(held)
    assert steps[-1].drop == steps[0].request_ids


def test_time_is_counted_once() -> None:
    stream = TimedStream(torch.device("cpu"))
    stream.submit(lambda: None).wait()
    assert stream.take_busy_s() > 0
    assert stream.take_busy_s() == pytest.approx(0.0)


def test_with_graphs_only_what_they_take_counts() -> None:
    class Runner:
        def watch_graphs(self, wrap: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
            self.run = wrap(lambda: ran.append("graph"))

    ran: list[str] = []
    runner: Any = Runner()
    stream = TimedStream(torch.device("cpu"))
    stream.watch(runner)
    stream.submit(lambda: ran.append("copies")).wait()
    assert stream.take_busy_s() == 0
    stream.submit(runner.run).wait()
    assert stream.take_busy_s() > 0
    assert ran == ["copies", "graph"]
