"""The executor's thread, beside the one that loads for it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.actors.executor import actor
from octavo.actors.executor.config import ExecutorConfig
from octavo.kernels import cpu_build
from octavo.kernels.thread_binding import team_cpus

TASKS = Path("/proc/self/task")


@pytest.mark.skipif(cpu_build.library() is None or not TASKS.exists(), reason="it needs the C kernels, and Linux")
def test_the_thread_that_loads_keeps_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would count as busy, and those of the thread that steps would go to sleep between any two operations."""
    numbers: list[int] = []

    def load(_config: Any) -> Any:
        team_cpus(3)
        numbers.append(len(list(TASKS.iterdir())))
        return SimpleNamespace(device="loaded")

    monkeypatch.setattr(actor, "load_runner", load)
    executor = actor.ExecutorThread(ExecutorConfig(model_path="unused"), lambda message: None)

    def run() -> None:
        assert executor.load() == "loaded"
        numbers.append(len(list(TASKS.iterdir())))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with_workers, without = numbers
    assert without == with_workers - 2
