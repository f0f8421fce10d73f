from __future__ import annotations

from octavo.actors.executor.launch_ahead import LaunchAhead
from octavo.messages.ids import Epoch, StepId
from octavo.messages.step import ExecuteStep, StepExecuted


def step(index: int) -> ExecuteStep:
    return ExecuteStep(Epoch(0), StepId(index), (), ())


class FakeDevice:
    """Is done with a step when a test says so, and otherwise when it is waited for."""

    def __init__(self, max_launched: int) -> None:
        self.max_launched = max_launched
        self.num_done = 0
        self.waited: list[int] = []

    def launch(self, step: ExecuteStep) -> int:
        return step.step_id

    def is_done(self, launched: int) -> bool:
        return launched < self.num_done

    def collect(self, launched: int) -> StepExecuted:
        if not self.is_done(launched):
            self.waited.append(launched)
            self.num_done = launched + 1
        return StepExecuted(Epoch(0), StepId(launched), (), ())


def test_a_runner_that_computes_at_launch_is_asked_for_the_result_before_anything_else() -> None:
    ahead = LaunchAhead(FakeDevice(max_launched=1))
    assert not ahead.is_due(has_step=True)
    ahead.launch(step(0))
    assert ahead.is_full
    assert ahead.is_due(has_step=True)
    assert ahead.collect().step_id == 0
    assert not ahead.is_full


def test_the_next_step_is_launched_before_the_only_one_in_flight_is_collected() -> None:
    device = FakeDevice(max_launched=2)
    ahead = LaunchAhead(device)
    ahead.launch(step(0))
    assert not ahead.is_due(has_step=True)
    assert not ahead.is_due(has_step=False)  # a step may still come while the device computes
    device.num_done = 1
    assert not ahead.is_due(has_step=True)  # the device has nothing to do now
    assert ahead.is_due(has_step=False)


def test_a_result_that_is_there_goes_before_a_step_that_can_wait() -> None:
    device = FakeDevice(max_launched=3)
    ahead = LaunchAhead(device)
    ahead.launch(step(0))
    ahead.launch(step(1))
    assert not ahead.is_due(has_step=True)
    device.num_done = 1
    assert ahead.is_due(has_step=True)
    assert ahead.collect().step_id == 0
    assert device.waited == []


def test_a_full_pipeline_waits_for_the_oldest() -> None:
    device = FakeDevice(max_launched=2)
    ahead = LaunchAhead(device)
    ahead.launch(step(0))
    ahead.launch(step(1))
    assert ahead.is_due(has_step=False)
    assert ahead.collect().step_id == 0
    assert device.waited == [0]
    assert len(ahead) == 1


def test_nothing_is_left_of_an_epoch_that_is_over() -> None:
    ahead = LaunchAhead(FakeDevice(max_launched=2))
    ahead.launch(step(0))
    ahead.clear()
    assert len(ahead) == 0
    assert not ahead.is_due(has_step=False)
