"""The executor's thread, beside the one that loads for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from c_library import HAS_C
from os_threads import CAN_LOOK, compute_with, running_threads, wait_until_gone

from octavo.actors.executor import actor
from octavo.actors.executor.config import ExecutorConfig


@pytest.mark.skipif(not HAS_C or not CAN_LOOK, reason="it needs the C kernels, and Linux")
def test_the_thread_that_loads_keeps_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would count as busy, and those of the thread that steps would go to sleep between any two operations."""
    workers: set[int] = set()
    left: list[set[int]] = []

    def load(_config: Any) -> Any:
        before = running_threads()
        compute_with(3)
        workers.update(running_threads() - before)
        return SimpleNamespace(device="loaded")

    monkeypatch.setattr(actor, "load_runner", load)
    executor = actor.ExecutorThread(ExecutorConfig(model_path="unused"), lambda message: None)

    def run() -> None:
        assert executor.load() == "loaded"
        wait_until_gone(workers)
        left.append(workers & running_threads())  # while this thread, whose they were, still lives

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(workers) >= 2
    assert left == [set()]
