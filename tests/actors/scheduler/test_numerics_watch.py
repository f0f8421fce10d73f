"""Logits that are no numbers: F-14 (of one request) and F-15 (of all)."""

from __future__ import annotations

from core_ring import submit
from msgspec.structs import replace

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId
from octavo.messages.kv import PrefixMatched
from octavo.messages.request import CancelRequest, RequestEnded
from octavo.messages.step import PlanDue, PlanStep, StepExecuted
from octavo.messages.system import ExecutorFailed, ExecutorLost

WHY = "the model computed NaN logits for this request"


class Rig:
    """A scheduler, and an executor of which rows are told."""

    def __init__(self, num_requests: int) -> None:
        config = SchedulerConfig(num_blocks=64, block_size=4, max_model_len=40, pipeline_depth=1)
        self.scheduler = SchedulerCore(config)
        self.epoch = Epoch(0)
        for request_id in range(num_requests):
            self.submit(request_id)

    def submit(self, request_id: int) -> None:
        self.scheduler.handle(submit(request_id, [1, 2, 3, 4 + request_id], eos=True), 1)

    def plan(self) -> PlanStep:
        """The next step that has rows, every match answered."""
        plan = self._plan_any()
        while not plan.request_ids:  # it only gives blocks back
            self.scheduler.handle(StepExecuted(plan.epoch, plan.step_id, (), ()), 1)
            plan = self._plan_any()
        return plan

    def _plan_any(self) -> PlanStep:
        out = self.scheduler.handle(PlanDue(), 1)
        for message in out:
            if type(message).__name__ == "MatchPrefix":
                self.scheduler.handle(PrefixMatched(self.epoch, message.request_id, 0, 0), 1)  # type: ignore[attr-defined]
        (plan,) = [m for m in (*out, *self.scheduler.handle(PlanDue(), 1)) if isinstance(m, PlanStep)]
        return plan

    def step(self, *sick: int) -> list[Message]:
        """Execute a step in which these requests come to NaN."""
        plan = self.plan()
        good = tuple(request_id for request_id in plan.request_ids if request_id not in sick)
        bad = tuple(request_id for request_id in plan.request_ids if request_id in sick)
        executed = StepExecuted(
            plan.epoch,
            plan.step_id,
            good,
            (7,) * len(good),
            failed=tuple((request_id, WHY) for request_id in bad),
            nonfinite=bad,
        )
        return self.scheduler.handle(executed, 1)

    def lose(self) -> None:
        self.epoch = Epoch(self.epoch + 1)
        self.scheduler.handle(ExecutorLost(self.epoch, "replaced", is_innocent=True), 1)


def ends(messages: list[Message]) -> dict[int, str]:
    return {m.request_id: m.error_code for m in messages if isinstance(m, RequestEnded)}


def is_given_up(messages: list[Message]) -> bool:
    """Whether the executor is, and then nothing else is said."""
    failures = [message for message in messages if isinstance(message, ExecutorFailed)]
    assert not failures or messages == failures
    assert all(failure.is_numerics for failure in failures)
    return bool(failures)


def test_f_14_a_request_whose_logits_are_no_numbers_ends_and_the_others_go_on() -> None:
    rig = Rig(3)
    rig.step()
    said = rig.step(1)
    assert ends(said) == {1: "model_numerics"}
    assert not any(isinstance(message, ExecutorFailed) for message in said)
    assert rig.plan().request_ids == (0, 2)


def test_f_15_if_no_row_comes_to_numbers_the_executor_is_given_up_and_the_step_done_again() -> None:
    rig = Rig(3)
    rig.step()
    assert is_given_up(rig.step(0, 1, 2))
    stats = rig.scheduler.stats()
    assert (stats.num_numerics_losses, stats.num_ended, stats.generation_tokens) == (1, 0, 3)
    rig.lose()
    said = rig.step()
    assert isinstance(said[0], StepExecuted) and said[0].request_ids == (0, 1, 2)
    assert rig.scheduler.stats().num_quarantined == 0
    rig.scheduler.check()


def test_f_15_if_none_does_after_that_either_the_requests_end_and_no_executor_is_given_up_for_it() -> None:
    rig = Rig(3)
    assert is_given_up(rig.step(0, 1, 2))
    rig.lose()
    assert ends(rig.step(0, 1, 2)) == dict.fromkeys(range(3), "model_numerics")
    for request_id in (3, 4):
        rig.submit(request_id)
    assert ends(rig.step(3, 4)) == dict.fromkeys((3, 4), "model_numerics"), "one retry, not one each"
    rig.submit(5)
    assert not ends(rig.step()), "it computes again"
    rig.submit(6)
    assert not ends(rig.step()) and not ends(rig.step())
    assert is_given_up(rig.step(5, 6)), "so the next time it is worth another try"
    assert rig.scheduler.stats().num_numerics_losses == 2


def test_f_15_requests_that_come_one_by_one_cost_one_of_them_until_the_executor_is_given_up() -> None:
    rig = Rig(1)
    assert ends(rig.step(0)) == {0: "model_numerics"}, "one alone may be its own fault"
    rig.submit(1)
    assert is_given_up(rig.step(1))
    rig.lose()
    assert not ends(rig.step())


def test_f_14_one_after_the_other_with_good_tokens_between_them_costs_no_executor() -> None:
    rig = Rig(1)
    for request_id in range(4):
        assert ends(rig.step(request_id)) == {request_id: "model_numerics"}
        rig.submit(10 + request_id)
        assert not ends(rig.step())
        rig.scheduler.handle(CancelRequest(RequestId(10 + request_id)), 1)
        rig.submit(request_id + 1)
    assert rig.scheduler.stats().num_numerics_losses == 0


def test_a_row_that_failed_for_another_reason_shows_that_the_executor_computes() -> None:
    rig = Rig(3)
    plan = rig.plan()
    executed = StepExecuted(
        plan.epoch,
        plan.step_id,
        (),
        (),
        failed=tuple((request_id, WHY) for request_id in plan.request_ids),
        nonfinite=plan.request_ids[:2],
    )
    said = rig.scheduler.handle(executed, 1)
    assert ends(said) == {0: "model_numerics", 1: "model_numerics", 2: "request_failed"}
    assert not is_given_up([message for message in said if isinstance(message, ExecutorFailed)])


def test_what_is_said_of_requests_that_have_ended_gives_up_nobody() -> None:
    rig = Rig(2)
    plan = rig.plan()
    for request_id in plan.request_ids:
        rig.scheduler.handle(CancelRequest(request_id), 1)
    failed = tuple((request_id, WHY) for request_id in plan.request_ids)
    executed = StepExecuted(plan.epoch, plan.step_id, (), (), failed=failed, nonfinite=plan.request_ids)
    assert rig.scheduler.handle(executed, 1) == [executed]


def test_f_16_no_numbers_of_a_row_that_did_not_fail_make_no_sense() -> None:
    rig = Rig(2)
    plan = rig.plan()
    executed = StepExecuted(plan.epoch, plan.step_id, plan.request_ids, (7, 7))
    (failure,) = rig.scheduler.handle(replace(executed, nonfinite=(RequestId(0),)), 1)
    assert isinstance(failure, ExecutorFailed) and not failure.is_numerics
