"""A team of workers ends when its thread has no more use for it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from octavo.kernels import cpu_build, thread_binding

TASKS = Path("/proc/self/task")

pytestmark = pytest.mark.skipif(
    cpu_build.library() is None or not TASKS.exists(), reason="it needs the C kernels, and Linux to look at threads"
)


def on_a_thread_of_its_own(numbers: list[int]) -> None:
    """Threads of this process: before a team, with it, without it, and with the next."""

    def run() -> None:
        for act in (lambda: None, compute, thread_binding.release_team, compute, thread_binding.release_team):
            act()
            numbers.append(len(list(TASKS.iterdir())))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def compute() -> None:
    assert len(thread_binding.team_cpus(3)) == 3


def test_released_workers_are_gone_and_new_ones_come_when_they_are_needed() -> None:
    numbers: list[int] = []
    on_a_thread_of_its_own(numbers)
    alone = numbers[0]
    assert numbers == [alone, alone + 2, alone, alone + 2, alone]


def test_a_thread_that_never_computed_has_nothing_to_release() -> None:
    thread_binding.release_team()
    thread_binding.release_team()
