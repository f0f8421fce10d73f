"""A team of workers ends when its thread has no more use for it."""

from __future__ import annotations

import threading

import pytest
from c_library import HAS_C
from os_threads import CAN_LOOK, compute_with, running_threads, wait_until_gone

from octavo.kernels import thread_binding

pytestmark = pytest.mark.skipif(
    not HAS_C or not CAN_LOOK, reason="it needs the C kernels, and Linux to look at threads"
)


def test_released_workers_are_gone_and_new_ones_come_when_they_are_needed() -> None:
    workers: list[set[int]] = []

    def run() -> None:
        for _ in range(2):
            before = running_threads()
            compute_with(3)
            workers.append(running_threads() - before)
            thread_binding.release_team()
            wait_until_gone(workers[-1])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [len(team) >= 2 for team in workers] == [True, True]
    assert not workers[0] & workers[1]
    assert not running_threads() & (workers[0] | workers[1])


def test_a_thread_that_never_computed_has_nothing_to_release() -> None:
    thread_binding.release_team()
    thread_binding.release_team()
