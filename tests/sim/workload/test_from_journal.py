from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
from core_ring import CoreRing, submit
from journaled_ring import header_of
from journaled_run import run_live
from sim_journal import SimJournal

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.errors import InvalidJournalError
from octavo.sim.journal.reader import JournalReader
from octavo.sim.workload.from_journal import read_journal

BLOCK = 4
CONFIG = SchedulerConfig(num_blocks=64, block_size=BLOCK, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64)


def record(path: Path, script: Any, *, has_tokens: bool = False) -> CoreRing:
    """Write the journal of a ring that `script` drives."""
    with path.open("wb") as file:
        journal = SimJournal(file, header_of(CONFIG, has_tokens=has_tokens))
        ring = CoreRing(CONFIG, vocab=8)
        ring.scheduler.handle = journal.wrap_scheduler(ring.scheduler.handle)  # type: ignore[method-assign]
        ring.allocator.handle = journal.wrap_allocator(ring.allocator.handle)  # type: ignore[method-assign]
        script(ring)
        journal.end()
    return ring


def laps(ring: CoreRing, num: int) -> None:
    for _ in range(num):
        ring.now_ns += 1000
        ring.lap()


def answer(ring: CoreRing, request_id: int) -> list[int]:
    stream = ring.executor.streams[request_id]
    return [stream[position] for position in range(ring.ended[request_id].num_output_tokens)]


@pytest.mark.parametrize("has_tokens", [False, True])
def test_prompts_share_what_they_shared_and_a_later_turn_holds_the_answer(has_tokens: bool, tmp_path: Path) -> None:
    first = [1, 2, 3, 4, 5, 6]  # one full block and half a one

    def script(ring: CoreRing) -> None:
        ring.submit(submit(0, first, max_tokens=7, arrival_ns=1))
        laps(ring, 12)
        ring.submit(submit(1, [*first, *answer(ring, 0), 7, 7], max_tokens=3, arrival_ns=20_000, priority=3))
        ring.submit(submit(2, [1, 2, 3, 4, 9, 9, 9, 9], max_tokens=2, arrival_ns=21_000))
        ring.submit(submit(3, [1, 2, 3, 4, 9, 9, 9, 9], max_tokens=2, arrival_ns=22_000, cache_salt="tenant"))
        laps(ring, 12)

    record(tmp_path / "j", script, has_tokens=has_tokens)
    workload = read_journal(tmp_path / "j")
    turn, later, other, foreign = workload.arrivals()
    assert [request.arrival_ns for request in (turn, later, other, foreign)] == [0, 19_999, 20_999, 21_999]
    assert [request.num_output_tokens for request in (turn, later, other, foreign)] == [7, 3, 2, 2]
    assert [request.num_prompt_tokens for request in (turn, later, other, foreign)] == [6, 15, 8, 8]
    assert (turn.priority, later.priority) == (0, 3)
    prompts = [array("i", request.prompt_token_ids()).tolist() for request in (turn, later, other, foreign)]
    assert prompts[1][: len(first)] == prompts[0]
    # The answer's tokens follow, as far as they fill blocks with what comes before: 6 + 6 tokens are 3 blocks.
    assert prompts[1][len(first) : 12] == [turn.answer_id] * 6
    assert turn.answer_id not in prompts[1][12:]
    assert prompts[2][:BLOCK] == prompts[0][:BLOCK]
    assert prompts[2][BLOCK:] != prompts[1][BLOCK : 2 * BLOCK]
    assert not set(prompts[3]) & (set(prompts[2]) | set(prompts[0])), "another salt shares nothing"
    assert workload.has_shared_prefixes
    assert workload.counts.num_rows == workload.counts.num_requests == 4
    ids = [content_id for request in workload.arrivals() for content_id, _ in request.segments]
    assert all(0 <= content_id < 2**31 for content_id in ids)


def test_who_was_cut_short_is_to_go_on_and_be_cut_short_again(tmp_path: Path) -> None:
    def script(ring: CoreRing) -> None:
        ring.submit(submit(0, [1, 2, 3], max_tokens=30, arrival_ns=1))
        ring.submit(submit(1, [1, 2, 3], max_tokens=30, arrival_ns=1, deadline_ns=5001))
        ring.submit(submit(2, [1, 2, 3], max_tokens=40, arrival_ns=1))
        ring.submit(submit(3, [3, 2, 1], max_tokens=None, arrival_ns=2))
        laps(ring, 6)
        ring.cancel(0)
        ring.stop(2)
        laps(ring, 2)

    ring = record(tmp_path / "j", script)
    cancelled, timed_out, stopped, running = read_journal(tmp_path / "j").arrivals()
    assert ring.ended[0].reason == ring.ended[1].reason == "abort"
    assert cancelled.num_output_tokens == 30
    assert cancelled.cancel_after_ns == 7000
    assert timed_out.num_output_tokens == 30
    assert timed_out.timeout_ns == 5000
    assert stopped.num_output_tokens == ring.ended[2].num_output_tokens
    assert running.num_output_tokens == 61
    counts = read_journal(tmp_path / "j").counts
    assert sum(counts.num_changed.values()) == 3


def test_nothing_is_shared_where_nothing_was(tmp_path: Path) -> None:
    def script(ring: CoreRing) -> None:
        for request_id in range(3):
            ring.submit(submit(request_id, [request_id] * 9, max_tokens=2, arrival_ns=request_id))
        laps(ring, 6)

    record(tmp_path / "j", script)
    workload = read_journal(tmp_path / "j")
    assert not workload.has_shared_prefixes
    seen: list[int] = []
    for request in workload.arrivals():
        seen += [content_id for content_id, _ in request.segments]
    assert len(seen) == len(set(seen))
    assert list(workload.arrivals()) == list(workload.arrivals()), "each call begins anew"


def test_a_live_journal_gives_each_request_the_length_it_had(tmp_path: Path) -> None:
    run = run_live(tmp_path / "j", num_requests=150, num_losses=1)
    workload = read_journal(tmp_path / "j", name="mine")
    assert workload.name == "mine"
    assert len(workload) == 150
    with JournalReader(tmp_path / "j") as reader:
        begin_ns = reader.header.start_ns
    assert begin_ns > 0
    # In order of arrival, which is the order of ids there.
    for request_id, request in enumerate(workload.arrivals()):
        ended = run.ended[request_id]
        assert request.num_prompt_tokens == len(run.prompts[request_id])
        if ended.reason in {"length", "stop"}:
            assert request.num_output_tokens == max(1, ended.num_output_tokens)


def test_a_journal_without_requests_is_no_workload(tmp_path: Path) -> None:
    record(tmp_path / "j", lambda ring: ring.plan())
    with pytest.raises(InvalidJournalError, match="holds no request"):
        read_journal(tmp_path / "j")
