from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from counting_clock import CountingClock
from fake_engine import FakeEngine

from octavo.gateway.soak import SoakPlan, SoakReport, fill_kv_cache, print_soak, soak
from octavo.gateway.soak_holdings import (
    Holdings,
    compare,
    give_back_freed_memory,
    orphaned_shared_memory,
    replaced,
)
from octavo.messages.errors import InvalidRequestError
from octavo.messages.ids import RequestId

PLAN = SoakPlan(warm_up_s=0.3, for_s=0.5, num_streams=4, fault_share=0.0, leave_share=0.3, most_tokens=8)

QUIET = Holdings(
    num_live=0,
    kv_usage=0.0,
    num_streams=0,
    num_files={"edge": 20, "octavo: executor 0": 9},
    num_threads={"edge": 4, "octavo: executor 0": 3},
    rss_bytes={"edge": 500 << 20, "octavo: executor 0": 400 << 20},
    num_tasks=3,
    num_shared=0,
    pids={"edge": 100, "octavo: executor 0": 101},
)


@pytest.fixture(autouse=True)
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the time of day, and what others of this host share in memory is not looked at."""
    monkeypatch.setattr("octavo.gateway.soak.time", CountingClock())
    monkeypatch.setattr("octavo.gateway.soak.LOOK_EVERY_S", 0.0)
    monkeypatch.setattr("octavo.gateway.soak_holdings.orphaned_shared_memory", lambda: set())


@pytest.fixture
def memory_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a second warm nothing up: the first traceback that is logged, for one, takes megabytes for good."""
    monkeypatch.setattr("octavo.gateway.soak_holdings.MIN_GROWTH_BYTES", 64 << 20)


def run(engine: FakeEngine, plan: SoakPlan = PLAN) -> SoakReport:
    async def soak_inside() -> SoakReport:
        return await soak(engine, plan, clients_inside=True)

    return asyncio.run(soak_inside())


@pytest.mark.usefixtures("memory_may_grow")
def test_an_engine_that_gives_everything_back_passes(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(FakeEngine())
    assert report.leaks == report.failures == [] and report.is_passed
    assert report.num_finished > 0 and report.num_left > 0 and report.num_failed == 0
    print_soak(report)
    assert "passed" in capsys.readouterr().out


def test_sequences_that_nobody_waits_for_any_more_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.gateway.soak_holdings.QUIET_S", 0.3)

    class Forgetful(FakeEngine):
        def cancel(self, request_id: RequestId) -> None:
            """The client has left; this engine never hears of it."""
            sequence = self._live.get(request_id)
            if sequence is not None:
                sequence.params = msgspec.structs.replace(sequence.params, max_tokens=None, ignore_eos=True)
                sequence.sink = lambda event: None

    # Nearly everybody leaves, long before the end: however few requests there is time for, some are forgotten.
    plan = msgspec.structs.replace(PLAN, warm_up_s=0.01, for_s=0.03, leave_share=0.9, most_tokens=500)
    report = run(Forgetful(max_model_len=10**9), plan)
    assert not report.is_passed
    assert any("held by nobody" in leak for leak in report.leaks)


def test_requests_that_fail_fail_the_run() -> None:
    engine = FakeEngine()
    engine.fail_after = 3
    report = run(engine)
    assert not report.is_passed and report.num_failed > 0


@pytest.mark.usefixtures("memory_may_grow")
def test_faults_hit_what_can_be_hit_and_their_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.gateway.soak.FAULT_PAUSE_S", 0.0)

    class Breakable(FakeEngine):
        def crash_actor(self, actor: str) -> None:
            if actor == "tokenizer":
                raise InvalidRequestError("not this one", param="actor")

    plan = msgspec.structs.replace(PLAN, fault_share=0.5)
    report = run(Breakable(), plan)
    assert report.is_passed and set(report.faults) == {"executor", "detokenizer"}
    unbreakable = run(FakeEngine(), plan)
    assert not unbreakable.is_passed and any("made to fail" in failure for failure in unbreakable.failures)


def fill(engine: FakeEngine) -> list[str]:
    async def fill_inside() -> list[str]:
        return await fill_kv_cache(engine, seed=0)

    return asyncio.run(fill_inside())


def test_prompts_without_a_common_prefix_fill_the_kv_cache() -> None:
    for max_model_len in (512, 100, 10):
        engine = FakeEngine(max_model_len=max_model_len)
        assert fill(engine) == []
        block_size = engine.config.block_size
        blocks = [
            tuple(prompt[begin : begin + block_size])
            for prompt in engine.prompts
            for begin in range(0, len(prompt), block_size)
        ]
        assert len(set(blocks)) == len(blocks) >= engine.num_blocks
        assert all(params.max_tokens == 1 for params in engine.submitted)


def test_a_kv_cache_that_cannot_be_filled_fails_the_run() -> None:
    engine = FakeEngine()
    engine.refuse_with = ("queue_full", "not now")
    assert fill(engine) == [f"{len(engine.prompts)} prompts that were to fill the KV cache failed: not now"]
    report = run(engine)
    assert not report.is_passed and any("fill the KV cache" in failure for failure in report.failures)


def test_freed_memory_that_malloc_keeps_is_not_counted() -> None:
    process = psutil.Process()
    pieces = [bytearray(64 << 10) for _ in range(1024)]
    held = pieces[::16]  # what lies between them cannot be given back by itself
    del pieces
    kept_bytes = process.memory_info().rss
    give_back_freed_memory()
    assert kept_bytes - process.memory_info().rss > 32 << 20
    assert len(held) == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_live": 1}, "held by nobody"),
        ({"kv_usage": 0.01}, "held by nobody"),
        ({"num_streams": 2}, "responses"),
        ({"num_tasks": 4}, "tasks"),
        ({"num_shared": 1}, "mappings of shared memory"),
        ({"num_orphans": 1}, "files of shared memory"),
        ({"num_files": {"edge": 21, "octavo: executor 0": 9}}, "file descriptors"),
        ({"num_threads": {"edge": 4, "octavo: executor 0": 4}}, "threads"),
        ({"rss_bytes": {"edge": 506 << 20, "octavo: executor 0": 400 << 20}}, "memory grew"),
        ({"rss_bytes": {"edge": 500 << 20}}, "is gone"),
        ({"rss_bytes": {**QUIET.rss_bytes, "octavo: executor 1": 1}}, "was not before"),
    ],
)
def test_whatever_grew_is_told(change: dict[str, object], words: str) -> None:
    leaks, _ = compare(QUIET, msgspec.structs.replace(QUIET, **change))
    assert len(leaks) == 1 and words in leaks[0]


def test_a_little_memory_and_a_replacement_are_no_leaks() -> None:
    assert compare(QUIET, QUIET) == ([], {"edge": 0.0, "octavo: executor 0": 0.0})
    little = msgspec.structs.replace(QUIET, rss_bytes={"edge": 504 << 20, "octavo: executor 0": 400 << 20})
    replaced = msgspec.structs.replace(
        QUIET,
        rss_bytes={"edge": 500 << 20, "octavo: executor 0": 450 << 20},
        pids={"edge": 100, "octavo: executor 0": 200},
    )
    assert compare(QUIET, little)[0] == compare(QUIET, replaced)[0] == []


def test_shared_memory_that_nobody_maps_belongs_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, left = tmp_path / "held", tmp_path / "left"
    for path in (held, left):
        path.write_bytes(bytes(mmap.PAGESIZE))
    (tmp_path / "folder").mkdir()
    with held.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert orphaned_shared_memory(tmp_path) == {left}
    assert orphaned_shared_memory(tmp_path) == {held, left}
    assert orphaned_shared_memory(tmp_path / "nothing") == set()
    monkeypatch.setattr("octavo.gateway.soak_holdings._files", lambda folder: [folder / "gone since", left])
    assert orphaned_shared_memory(tmp_path) == {left}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Holdings]]:
    """What is counted, one after the other."""
    given: list[Holdings] = []

    async def next_count(*_: Any) -> Holdings:
        return given.pop(0)

    monkeypatch.setattr("octavo.gateway.soak.holdings_when_quiet", next_count)
    yield given
    assert not given


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"rss_bytes": {"edge": 500 << 20, "octavo: executor 0": 460 << 20}}, "memory grew by 2.2 %"),
        ({"pids": {"edge": 100, "octavo: executor 0": 300}}, "executor 0 was replaced"),
    ],
    ids=["nothing", "memory of a replacement", "an executor that died by itself"],
)
def test_what_grows_in_a_process_that_replaced_another_is_found_once_there_are_no_faults(
    counts: list[Holdings], change: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = msgspec.structs.replace(
        QUIET,
        rss_bytes={"edge": 500 << 20, "octavo: executor 0": 450 << 20},
        pids={"edge": 100, "octavo: executor 0": 200},
    )
    counts += [QUIET, killed, killed, msgspec.structs.replace(killed, **change)]
    plan = msgspec.structs.replace(PLAN, warm_up_s=0.05, for_s=0.1, calm_s=0.1)
    report = run(FakeEngine(), plan)
    assert report.is_passed == (not words)
    assert [leak for leak in report.leaks if not (leak.startswith("without faults: ") and words in leak)] == []
    assert len(report.leaks) == bool(words)
    print_soak(report)
    assert "executor 0, without faults" in capsys.readouterr().out


def test_only_a_process_that_was_there_before_can_have_been_replaced() -> None:
    fewer = msgspec.structs.replace(QUIET, pids={"edge": 100})
    assert replaced(QUIET, QUIET) == replaced(QUIET, fewer) == replaced(fewer, QUIET) == []
    assert len(replaced(QUIET, msgspec.structs.replace(QUIET, pids={"edge": 1, "octavo: executor 0": 2}))) == 2
