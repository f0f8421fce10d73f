"""Work that may take long or never come back, on threads that are given up on after a deadline."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, Literal, TypeVar

T = TypeVar("T")

DEADLINE_S: Final = 30.0
MAX_THREADS: Final = 2
MAX_ABANDONED: Final = 4
MAX_ATTEMPTS: Final = 2

NO_THREAD_PAUSE_S: Final = 0.25
"""Until the next try where the system has no thread to give."""

Outcome = Literal["done", "died", "hung", "stuck"]
"""`died`: the worker was lost each time; `hung`: it did not come back in time; `stuck`: too many workers hang, or the
system has given no thread for as long as one may take."""


class _Job(Generic[T]):
    __slots__ = ("is_over", "num_attempts", "num_refusals", "on_end", "work")

    def __init__(self, work: Callable[[], T], on_end: Callable[[Outcome, T | None], None]) -> None:
        self.work = work
        self.on_end = on_end
        self.num_attempts = 0
        self.num_refusals = 0  # tries for which there was no thread
        self.is_over = False


class JobThreads(Generic[T]):
    """Runs jobs beside the event loop, each on a thread of its own, a few at a time.

    A thread costs less than the smallest job here. One that is lost, or overdue, is replaced by another for one more
    try. Nobody can stop a thread that hangs: it is a daemon, does not keep the process alive, and no longer counts as
    one of those that may run, but as one of the few that may be abandoned.

    Args:
        deadline_s: for one try.
        max_threads: that are waited for.
        max_abandoned: that hang; with so many no more jobs are begun.

    Attributes:
        num_restarts: workers that were lost or given up on.
    """

    def __init__(
        self, *, deadline_s: float = DEADLINE_S, max_threads: int = MAX_THREADS, max_abandoned: int = MAX_ABANDONED
    ) -> None:
        self._deadline_s = deadline_s
        self._max_threads = max_threads
        self._max_abandoned = max_abandoned
        self._waiting: deque[_Job[T]] = deque()
        self._running: dict[tuple[_Job[T], int], asyncio.TimerHandle] = {}
        self._abandoned: dict[tuple[_Job[T], int], None] = {}
        self._crashes = False
        self._is_closed = False
        self._retry: asyncio.TimerHandle | None = None
        self.num_restarts = 0

    @property
    def num_abandoned(self) -> int:
        return len(self._abandoned)

    @property
    def crashes_next(self) -> bool:
        """Whether the next worker is going to die."""
        return self._crashes

    def crash(self) -> None:
        """Let the next worker die without an answer, once: for tests and `octavo chaos`."""
        self._crashes = True

    def run(self, work: Callable[[], T], on_end: Callable[[Outcome, T | None], None], *, num_tries: int = 0) -> None:
        """Do `work` on a thread; `on_end` is called once on the loop, with what came of it.

        Args:
            work: whatever it raises is the death of its worker.
            num_tries: that it had elsewhere.
        """
        job = _Job(work, on_end)
        job.num_attempts = num_tries
        self._waiting.append(job)
        self._start()

    def close(self) -> None:
        """Begin nothing more and tell nobody; waits for no thread."""
        self._is_closed = True
        if self._retry is not None:
            self._retry.cancel()
        self._waiting.clear()
        for timer in self._running.values():
            timer.cancel()
        self._running.clear()

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._max_threads and not self._is_closed:
            job = self._waiting.popleft()
            if len(self._abandoned) >= self._max_abandoned:
                self._end(job, "stuck", None)
                continue
            job.num_attempts += 1
            attempt = (job, job.num_attempts)
            loop = asyncio.get_running_loop()
            self._running[attempt] = loop.call_later(self._deadline_s, self._overdue, attempt)
            dies, self._crashes = self._crashes, False
            worker = threading.Thread(
                target=self._work, args=(loop, attempt, dies), name=f"octavo tokenizer {job.num_attempts}", daemon=True
            )
            try:
                worker.start()
            except RuntimeError:  # the system has no more of them (EAGAIN)
                self._crashes = dies
                self._running.pop(attempt).cancel()
                self._put_off(job)
                return

    def _put_off(self, job: _Job[T]) -> None:
        """Try again when there may be a thread, and give up on a job that has waited for as long as one may take."""
        job.num_attempts -= 1
        job.num_refusals += 1
        if job.num_refusals * NO_THREAD_PAUSE_S >= self._deadline_s:
            self._end(job, "stuck", None)
        else:
            self._waiting.appendleft(job)
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(NO_THREAD_PAUSE_S, self._start_again)

    def _start_again(self) -> None:
        self._retry = None
        self._start()

    def _work(self, loop: asyncio.AbstractEventLoop, attempt: tuple[_Job[T], int], dies: bool) -> None:
        outcome: Outcome = "died"
        result: T | None = None
        try:
            if not dies:
                result = attempt[0].work()
                outcome = "done"
        except BaseException:  # noqa: S110  a library's panic is no Exception; whatever it is, this worker is lost
            pass
        try:
            loop.call_soon_threadsafe(self._came_back, attempt, outcome, result)
        except RuntimeError:  # the loop was closed meanwhile
            return

    def _came_back(self, attempt: tuple[_Job[T], int], outcome: Outcome, result: T | None) -> None:
        job, _ = attempt
        was_abandoned = attempt in self._abandoned
        self._abandoned.pop(attempt, None)
        timer = self._running.pop(attempt, None)
        if timer is not None:
            timer.cancel()
        if self._is_closed:
            return
        if not job.is_over:
            if outcome == "done":
                self._end(job, "done", result)
            elif not was_abandoned:
                self._lost(job, "died")
        self._start()

    def _overdue(self, attempt: tuple[_Job[T], int]) -> None:
        if attempt not in self._running:
            return
        del self._running[attempt]
        self._abandoned[attempt] = None
        if not attempt[0].is_over:
            self._lost(attempt[0], "hung")
        self._start()

    def _lost(self, job: _Job[T], outcome: Outcome) -> None:
        self.num_restarts += 1
        if job.num_attempts >= MAX_ATTEMPTS:
            self._end(job, outcome, None)
        else:
            self._waiting.appendleft(job)

    def _end(self, job: _Job[T], outcome: Outcome, result: T | None) -> None:
        job.is_over = True
        if job in self._waiting:  # its first try came back after all, before the second began
            self._waiting.remove(job)
        job.on_end(outcome, result)
