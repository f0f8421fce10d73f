from __future__ import annotations

from octavo.actors.supervisor.core import SupervisorConfig, SupervisorCore
from octavo.messages.ids import Epoch
from octavo.messages.system import ExecutorFailed, ExecutorLost, ExecutorReady, StartExecutor


def test_a_failed_executor_is_started_again_under_a_new_epoch() -> None:
    core = SupervisorCore(SupervisorConfig())
    core.handle(ExecutorReady(Epoch(0)), 0)
    assert core.is_executor_ready
    answers = core.handle(ExecutorFailed(Epoch(0), "boom"), 1)
    assert answers == [StartExecutor(Epoch(1)), ExecutorLost(Epoch(1), "boom")]
    assert not core.is_executor_ready
    core.handle(ExecutorReady(Epoch(1)), 2)
    assert core.is_executor_ready
    assert core.num_restarts == 1


def test_news_of_an_older_epoch_change_nothing() -> None:
    core = SupervisorCore(SupervisorConfig())
    core.handle(ExecutorFailed(Epoch(0), "boom"), 1)
    assert core.handle(ExecutorFailed(Epoch(0), "boom again"), 2) == []
    core.handle(ExecutorReady(Epoch(0)), 3)
    assert not core.is_executor_ready


def test_it_gives_up_when_restarts_are_no_repair_and_not_before() -> None:
    core = SupervisorCore(SupervisorConfig(max_restarts=2, period_ns=100))
    assert core.handle(ExecutorFailed(Epoch(0), "boom"), 0)
    assert core.handle(ExecutorFailed(Epoch(1), "boom"), 10)
    assert core.handle(ExecutorFailed(Epoch(2), "boom"), 105), "the first restart is out of the window"
    assert core.handle(ExecutorFailed(Epoch(3), "the end"), 106) == []
    assert core.gave_up_because == "the end"
