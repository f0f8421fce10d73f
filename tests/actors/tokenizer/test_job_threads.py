from __future__ import annotations

import asyncio
import threading

import pytest

from octavo.actors.tokenizer import job_threads
from octavo.actors.tokenizer.job_threads import JobThreads, Outcome


@pytest.fixture
def threads_left(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the system has a thread for each next try; it has one for every try behind these."""
    left: list[bool] = []
    start = threading.Thread.start

    def start_if_there_is_one(self: threading.Thread) -> None:
        if left and not left.pop(0):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(job_threads.threading.Thread, "start", start_if_there_is_one)
    monkeypatch.setattr(job_threads, "NO_THREAD_PAUSE_S", 0.001)
    return left


async def run_all(jobs: JobThreads[int], count: int) -> list[tuple[Outcome, int | None]]:
    ended: list[tuple[Outcome, int | None]] = []
    is_over = asyncio.Event()

    def on_end(outcome: Outcome, result: int | None) -> None:
        ended.append((outcome, result))
        if len(ended) == count:
            is_over.set()

    for number in range(count):
        jobs.run(lambda number=number: number, on_end)
    await asyncio.wait_for(is_over.wait(), 30)
    jobs.close()
    return ended


def test_f_51_jobs_for_which_there_is_no_thread_wait_until_there_is_one(threads_left: list[bool]) -> None:
    threads_left += [False] * 7 + [True, False]
    jobs: JobThreads[int] = JobThreads()
    ended = asyncio.run(run_all(jobs, 5))
    assert sorted(ended) == [("done", number) for number in range(5)]
    assert jobs.num_restarts == 0, "no worker was lost"
    assert threads_left == []


def test_f_51_jobs_for_which_there_is_never_a_thread_are_refused_one_by_one(threads_left: list[bool]) -> None:
    threads_left += [False] * 10_000
    jobs: JobThreads[int] = JobThreads(deadline_s=0.01)
    ended = asyncio.run(run_all(jobs, 3))
    assert ended == [("stuck", None)] * 3
    assert len(threads_left) >= 10_000 - 31, "ten tries each, with pauses, and no loop"
